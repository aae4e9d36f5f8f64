package fastvlm

/**
 * A parser of JSON without dependencies, for tokenizer.json and for golden vectors.
 *
 * Objects become [Map], arrays [List], texts [String], numbers [Double], and the rest [Boolean] and null.
 */
class Json private constructor(private val text: String) {
    private var at = 0

    companion object {
        /** @throws IllegalArgumentException where the text is no JSON. */
        fun parse(text: String): Any? {
            val parser = Json(text)
            val value = parser.value()
            parser.skipSpace()
            parser.check(parser.at == text.length)
            return value
        }
    }

    private fun check(condition: Boolean) = require(condition) { "not valid JSON at character $at" }

    private fun skipSpace() {
        while (at < text.length && text[at] in " \t\r\n") at++
    }

    private fun next(): Char {
        check(at < text.length)
        return text[at++]
    }

    private fun value(): Any? {
        skipSpace()
        check(at < text.length)
        return when (text[at]) {
            '{' -> members()
            '[' -> items()
            '"' -> string()
            't' -> word("true", true)
            'f' -> word("false", false)
            'n' -> word("null", null)
            else -> number()
        }
    }

    private fun word(word: String, value: Boolean?): Boolean? {
        check(text.startsWith(word, at))
        at += word.length
        return value
    }

    private fun number(): Double {
        val start = at
        while (at < text.length && text[at] in "+-.0123456789eE") at++
        val found = text.substring(start, at).toDoubleOrNull()
        check(found != null)
        return found!!
    }

    private fun members(): Map<String, Any?> {
        val found = LinkedHashMap<String, Any?>()
        at++
        skipSpace()
        if (text.startsWith("}", at)) {
            at++
            return found
        }
        while (true) {
            skipSpace()
            check(text.startsWith("\"", at))
            val name = string()
            skipSpace()
            check(next() == ':')
            found[name] = value()
            if (ends('}')) return found
        }
    }

    private fun items(): List<Any?> {
        val found = ArrayList<Any?>()
        at++
        skipSpace()
        if (text.startsWith("]", at)) {
            at++
            return found
        }
        while (true) {
            found.add(value())
            if (ends(']')) return found
        }
    }

    /** Whether a list ends here, rather than going on behind a comma. */
    private fun ends(bracket: Char): Boolean {
        skipSpace()
        val char = next()
        check(char == bracket || char == ',')
        return char == bracket
    }

    private fun string(): String {
        val found = StringBuilder()
        at++
        while (true) {
            val char = next()
            when (char) {
                '"' -> return found.toString()
                '\\' -> found.append(escaped())
                else -> found.append(char)
            }
        }
    }

    private fun escaped(): Char = when (val char = next()) {
        '"', '\\', '/' -> char
        'b' -> '\b'
        'f' -> '\u000c'
        'n' -> '\n'
        'r' -> '\r'
        't' -> '\t'
        else -> {
            check(char == 'u' && at + 4 <= text.length)
            val code = text.substring(at, at + 4).toIntOrNull(16)
            check(code != null)
            at += 4
            code!!.toChar()
        }
    }
}
