package fastvlm

import java.nio.charset.Charset
import java.text.Normalizer
import java.util.regex.Pattern

/**
 * A piece of a prompt.
 *
 * @property isFormat Whether the prompt's format wrote it, so that special tokens in it are tokens.
 */
class Text(val content: String, val isFormat: Boolean = false)

/**
 * Byte-level byte-pair encoding as Qwen2 uses it, from the tokenizer.json of a bundle.
 *
 * A special token that a user types is ordinary text; only the prompt's format can write one.
 */
class Tokenizer private constructor(
    private val vocabulary: Map<String, Int>,
    private val ranks: Map<Pair<String, String>, Int>,
    private val added: List<AddedToken>,
    private val ignoresMerges: Boolean
) {
    private val tokens: Map<Int, String> = HashMap<Int, String>().apply {
        for ((token, id) in vocabulary) put(id, token)
        for (token in added) put(token.id, token.content)
    }
    private val special = added.filter { it.isSpecial }.associateBy { it.content }
    private val specialIds = special.values.map { it.id }.toSet()
    private val specialPattern = anyOf(special.keys)
    private val plain = added.filter { !it.isSpecial }.associateBy { it.content }
    private val rawPattern = anyOf(plain.values.filter { !it.isNormalized }.map { it.content })
    private val normalizedPattern = anyOf(plain.values.filter { it.isNormalized }.map { it.content })
    private val words = HashMap<String, IntArray>()

    /** Token ids of a user's text. */
    fun encode(text: String): IntArray = encode(listOf(Text(text)))

    /**
     * Token ids of texts that stand side by side.
     *
     * Where no special token stands between them, byte-pair encoding joins what the format wrote and what the
     * user typed, as it does in the original code.
     *
     * @throws IllegalArgumentException where the vocabulary lacks a byte of the text.
     */
    fun encode(texts: List<Text>): IntArray {
        val ids = ArrayList<Int>()
        val run = StringBuilder()
        var strips = false
        for (text in texts) {
            for (piece in if (text.isFormat) split(text.content, specialPattern) else listOf(text.content)) {
                val token = if (text.isFormat) special[piece] else null
                if (token == null) {
                    run.append(piece)
                    continue
                }
                encodeRun(stripped(run.toString(), strips, token.stripsLeft), ids)
                ids.add(token.id)
                run.setLength(0)
                strips = token.stripsRight
            }
        }
        encodeRun(stripped(run.toString(), strips, false), ids)
        return ids.toIntArray()
    }

    /** Text of token ids without special tokens; bytes that are no UTF-8 become U+FFFD. */
    fun decode(ids: IntArray): String {
        val bytes = java.io.ByteArrayOutputStream()
        for (id in ids) {
            val token = if (id in specialIds) null else tokens[id]
            if (token == null) continue
            val found = ByteArray(token.length)
            val isBytes = token.indices.all { i ->
                val byte = BYTE_OF[token[i]]
                found[i] = (byte ?: 0).toByte()
                byte != null
            }
            bytes.write(if (isBytes) found else token.toByteArray(UTF_8))
        }
        return String(bytes.toByteArray(), UTF_8)
    }

    private fun encodeRun(run: String, ids: MutableList<Int>) {
        for (piece in split(run, rawPattern)) {
            val whole = plain[piece]
            if (whole != null && !whole.isNormalized) {
                ids.add(whole.id)
                continue
            }
            for (part in split(Normalizer.normalize(piece, Normalizer.Form.NFC), normalizedPattern)) {
                val token = plain[part]
                if (token != null && token.isNormalized) ids.add(token.id) else encodeWords(part, ids)
            }
        }
    }

    private fun encodeWords(text: String, ids: MutableList<Int>) {
        val matcher = WORD.matcher(text)
        while (matcher.find()) {
            val word = matcher.group()
            for (id in words.getOrPut(word) { encodeWord(word) }) ids.add(id)
        }
    }

    /** Merge the pair of lowest rank, the first of equals, until none is left. */
    private fun encodeWord(word: String): IntArray {
        val symbols = ArrayList<String>()
        for (byte in word.toByteArray(UTF_8)) symbols.add(CHAR_OF[byte.toInt() and 255].toString())
        for (symbol in symbols) {
            require(symbol in vocabulary) { "the tokenizer cannot express '$word'" }
        }
        val whole = vocabulary[symbols.joinToString("")]
        if (ignoresMerges && whole != null) return intArrayOf(whole)
        while (true) {
            var best = -1
            var bestRank = Int.MAX_VALUE
            for (i in 0 until symbols.size - 1) {
                val rank = ranks[Pair(symbols[i], symbols[i + 1])] ?: continue
                if (rank < bestRank) {
                    best = i
                    bestRank = rank
                }
            }
            if (best < 0) break
            symbols[best] = symbols[best] + symbols[best + 1]
            symbols.removeAt(best + 1)
        }
        return IntArray(symbols.size) { vocabulary.getValue(symbols[it]) }
    }

    private class AddedToken(
        val content: String,
        val id: Int,
        val isSpecial: Boolean,
        val isNormalized: Boolean,
        val stripsLeft: Boolean,
        val stripsRight: Boolean
    )

    companion object {
        private val UTF_8: Charset = Charsets.UTF_8

        /**
         * Read a tokenizer.json.
         *
         * @throws IllegalArgumentException where it is of another kind than Qwen2's.
         */
        fun parse(json: String): Tokenizer {
            val root = members(Json.parse(json))
            val model = members(root["model"])
            require(model["type"] == "BPE") { "tokenizer.json is not of byte-pair encoding" }
            require(members(root["normalizer"])["type"] == "NFC") { "tokenizer.json does not normalize to NFC" }
            val steps = items(members(root["pre_tokenizer"])["pretokenizers"]).map { members(it) }
            require(splitsAsQwen2(steps)) { "tokenizer.json does not split text as Qwen2's" }
            val vocabulary = HashMap<String, Int>()
            for ((token, id) in members(model["vocab"])) vocabulary[token] = (id as Double).toInt()
            val ranks = HashMap<Pair<String, String>, Int>()
            for (merge in items(model["merges"])) {
                val parts = if (merge is String) merge.split(" ") else items(merge).map { it as String }
                ranks[Pair(parts[0], parts[1])] = ranks.size
            }
            val added = items(root["added_tokens"]).map { addedToken(members(it)) }
            return Tokenizer(vocabulary, ranks, added, model["ignore_merges"] == true)
        }

        private fun splitsAsQwen2(steps: List<Map<String, Any?>>): Boolean =
            steps.map { it["type"] } == listOf("Split", "ByteLevel") &&
                members(steps[0]["pattern"])["Regex"] == QWEN2_SPLIT && steps[0]["behavior"] == "Isolated" &&
                steps[1]["use_regex"] == false && steps[1]["add_prefix_space"] == false

        private fun addedToken(entry: Map<String, Any?>): AddedToken {
            val token = AddedToken(
                entry["content"] as String,
                (entry["id"] as Double).toInt(),
                entry["special"] == true,
                entry["normalized"] == true,
                entry["lstrip"] == true,
                entry["rstrip"] == true
            )
            val isOdd = token.stripsLeft || token.stripsRight || entry["single_word"] == true
            require(token.isSpecial || !isOdd) { "the added token '${token.content}' is not supported" }
            return token
        }

        @Suppress("UNCHECKED_CAST")
        private fun members(value: Any?): Map<String, Any?> {
            require(value is Map<*, *>) { "tokenizer.json has not the form that was expected" }
            return value as Map<String, Any?>
        }

        private fun items(value: Any?): List<Any?> {
            require(value is List<*>) { "tokenizer.json has not the form that was expected" }
            return value
        }

        private fun anyOf(texts: Collection<String>): Pattern? {
            val longestFirst = texts.sortedByDescending { it.length }
            if (longestFirst.isEmpty()) return null
            return Pattern.compile(longestFirst.joinToString("|") { Pattern.quote(it) })
        }

        /** A text cut before and behind every match; pieces are not empty. */
        private fun split(text: String, pattern: Pattern?): List<String> {
            if (text == "") return emptyList()
            if (pattern == null) return listOf(text)
            val found = ArrayList<String>()
            val matcher = pattern.matcher(text)
            var behind = 0
            while (matcher.find()) {
                if (matcher.start() > behind) found.add(text.substring(behind, matcher.start()))
                found.add(matcher.group())
                behind = matcher.end()
            }
            if (behind < text.length) found.add(text.substring(behind))
            return found
        }

        private fun stripped(text: String, left: Boolean, right: Boolean): String {
            val trimmed = if (left) text.trimStart { isSpace(it) } else text
            return if (right) trimmed.trimEnd { isSpace(it) } else trimmed
        }

        private fun isSpace(char: Char): Boolean = char in SPACES || char in '\u001c'..'\u001f'

        private const val QWEN2_SPLIT =
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*" +
                "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

        /** Unicode's White_Space: the regular expressions of Java and of Android mean less and other things by \s. */
        private const val SPACES =
            "\t\n\u000b\u000c\r \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a" +
                "\u2028\u2029\u202f\u205f\u3000"

        /** The same split in what both engines agree on; Unicode's folding takes the long s for an s. */
        private val WORD: Pattern = Pattern.compile(
            "'(?:[sS\u017f]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])" +
                "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^$SPACES\\p{L}\\p{N}]+[\\r\\n]*" +
                "|[$SPACES]*[\\r\\n]+|[$SPACES]+(?![^$SPACES])|[$SPACES]+"
        )

        /** The printable character that stands for each byte in the vocabulary. */
        private val CHAR_OF: CharArray = byteCharacters()
        private val BYTE_OF: Map<Char, Int> = HashMap<Char, Int>().apply {
            for (byte in 0..255) put(CHAR_OF[byte], byte)
        }

        private fun byteCharacters(): CharArray {
            val isPrintable = { byte: Int -> byte in 0x21..0x7e || byte in 0xa1..0xac || byte in 0xae..0xff }
            var next = 256
            return CharArray(256) { byte -> (if (isPrintable(byte)) byte else next++).toChar() }
        }
    }
}
