package fastvlm

import java.io.File
import java.security.MessageDigest
import java.util.Base64

/**
 * Golden vectors of a bundle, as `fastvlm-convert bundle vectors` writes them.
 *
 * The system properties `fastvlm.bundle` and `fastvlm.vectors` say where both are.
 */
object Golden {
    val bundle = File(property("fastvlm.bundle"))
    val root = members(Json.parse(File(property("fastvlm.vectors")).readText()))
    val cases = items(root["cases"]).map { members(it) }
    val texts = items(root["texts"]).map { members(it) }
    val tokenizer = Tokenizer.parse(File(bundle, "tokenizer.json").readText())

    fun picture(case: Map<String, Any?>): Picture {
        val picture = members(case["picture"])
        val rgb = Base64.getDecoder().decode(picture["rgb_base64"] as String)
        return Picture(integer(picture["width"]), integer(picture["height"]), rgb)
    }

    /** Token ids of a prompt with one picture. */
    fun prompt(question: String): List<List<Int>> =
        promptSegments(listOf(Message("user", question, pictures = 1)), tokenizer).map { it.toList() }

    /** See that sampled values of an array are within their tolerance. */
    fun check(what: String, sampled: Any?, found: FloatArray) {
        val golden = members(sampled)
        val tolerance = golden["tolerance"] as Double
        val size = items(golden["shape"]).map { integer(it) }.fold(1) { product, n -> product * n }
        check(size == found.size) { "$what has ${found.size} values, not $size" }
        items(golden["indices"]).zip(items(golden["values"])).forEach { (index, value) ->
            val difference = Math.abs(found[integer(index)] - value as Double)
            check(difference <= tolerance) { "$what[$index] is ${found[integer(index)]}, not $value" }
        }
    }

    fun sha256(bytes: ByteArray): String =
        MessageDigest.getInstance("SHA-256").digest(bytes).joinToString("") { "%02x".format(it) }

    fun integer(value: Any?): Int = (value as Double).toInt()

    fun integers(value: Any?): List<Int> = items(value).map { integer(it) }

    fun segments(value: Any?): List<List<Int>> = items(value).map { integers(it) }

    @Suppress("UNCHECKED_CAST")
    fun members(value: Any?): Map<String, Any?> = value as Map<String, Any?>

    fun items(value: Any?): List<Any?> = value as List<*>

    private fun property(name: String): String =
        requireNotNull(System.getProperty(name)) { "the system property $name is not set" }
}
