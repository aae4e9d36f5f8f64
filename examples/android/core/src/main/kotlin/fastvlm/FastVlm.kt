package fastvlm

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtSession
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.security.MessageDigest

/**
 * What a model said.
 *
 * @property tokenIds Without the end token.
 * @property isFinished Whether the model ended the answer itself, rather than the limit or [FastVlm.cancel].
 */
class Answer(val text: String, val tokenIds: IntArray, val isFinished: Boolean)

/**
 * A bundle, run by ONNX Runtime on the CPU.
 *
 * It holds one conversation, and is used by one thread at a time; [cancel] may be called from any.
 *
 * @param bundle Folder of the bundle that [BundleConstants] was generated from.
 * @param threads How many threads compute; the number of fast cores of a phone is best.
 * @throws IllegalArgumentException where the constants belong to another bundle.
 * @throws OrtException where ONNX Runtime refuses a graph.
 */
class FastVlm(bundle: File, threads: Int) : AutoCloseable {
    /** Text to token ids and back. */
    val tokenizer: Tokenizer

    private val environment = OrtEnvironment.getEnvironment()
    private val options = OrtSession.SessionOptions()
    private val vision: OrtSession
    private val embed: OrtSession
    private val decoder: OrtSession
    private val cache: List<OnnxTensor>
    private var length = 0
    private var running: OrtSession.RunOptions? = null

    @Volatile
    private var isCancelled = false

    init {
        val manifest = File(bundle, "fastvlm_manifest.json")
        require(sha256(manifest) == BundleConstants.MANIFEST_SHA256) {
            "BundleConstants.kt belongs to another bundle than $bundle: generate it again with " +
                "`fastvlm-convert bundle constants`"
        }
        tokenizer = Tokenizer.parse(File(bundle, "tokenizer.json").readText())
        options.setIntraOpNumThreads(threads)
        vision = environment.createSession(File(bundle, BundleConstants.VISION.path).path, options)
        embed = environment.createSession(File(bundle, BundleConstants.EMBED.path).path, options)
        decoder = environment.createSession(File(bundle, BundleConstants.DECODER.path).path, options)
        cache = BundleConstants.CACHE_INPUTS.map { emptyCache() }
    }

    /**
     * Answer a question about a picture.
     *
     * @param picture The picture, or null for a question of text alone.
     * @param maxNewTokens Most tokens to answer with.
     * @param onText Called with the pieces of the answer as they come; half a character waits for the rest.
     */
    fun ask(picture: Picture?, question: String, maxNewTokens: Int, onText: (String) -> Unit): Answer {
        val message = Message("user", question, if (picture == null) 0 else 1)
        return reply(listOf(message), listOfNotNull(picture), maxNewTokens, onText)
    }

    /**
     * Answer the last message of a conversation.
     *
     * @param pictures Those of all messages, in order.
     * @throws IllegalArgumentException where prompt and answer do not fit into the context.
     */
    fun reply(
        messages: List<Message>,
        pictures: List<Picture>,
        maxNewTokens: Int,
        onText: (String) -> Unit
    ): Answer {
        val mentioned = messages.map { it.pictures }.sum()
        require(mentioned == pictures.size) { "the messages mention $mentioned pictures, given are ${pictures.size}" }
        val segments = promptSegments(messages, tokenizer)
        val promptTokens = segments.map { it.size }.sum() + pictures.size * BundleConstants.NUM_IMAGE_TOKENS
        require(promptTokens + maxNewTokens <= BundleConstants.CONTEXT_LENGTH) {
            "a prompt of $promptTokens tokens and an answer of up to $maxNewTokens exceed the context of " +
                "${BundleConstants.CONTEXT_LENGTH} tokens"
        }
        OrtSession.RunOptions().use { run ->
            begin(run)
            try {
                return stream(run, segments, pictures, maxNewTokens, onText)
            } catch (stopped: Cancelled) {
                return Answer(stopped.text, stopped.tokenIds, isFinished = false)
            } finally {
                end()
            }
        }
    }

    /** End the answer that is being computed, even within the prompt; what has come so far is returned. */
    @Synchronized
    fun cancel() {
        isCancelled = true
        running?.setTerminate(true)
    }

    /** Image tokens of a picture: float [num_image_tokens, hidden]. */
    fun encodeImage(picture: Picture): FloatArray =
        OrtSession.RunOptions().use { encode(it, picture) }

    /** Logits behind a whole prompt, float [vocab]; a new sequence begins. */
    fun prefill(segments: List<IntArray>, features: List<FloatArray>): FloatArray =
        OrtSession.RunOptions().use { prefill(it, segments, features) }

    override fun close() {
        cache.forEach { it.close() }
        listOf(vision, embed, decoder).forEach { it.close() }
        options.close()
    }

    @Synchronized
    private fun begin(run: OrtSession.RunOptions) {
        isCancelled = false
        running = run
    }

    @Synchronized
    private fun end() {
        running = null
    }

    private class Cancelled(val text: String, val tokenIds: IntArray) : RuntimeException()

    private fun stream(
        run: OrtSession.RunOptions,
        segments: List<IntArray>,
        pictures: List<Picture>,
        maxNewTokens: Int,
        onText: (String) -> Unit
    ): Answer {
        val ids = ArrayList<Int>()
        var shown = ""
        fun <T> step(compute: () -> T): T {
            try {
                if (!isCancelled) return compute()
            } catch (error: OrtException) {
                if (!isCancelled) throw error
            }
            throw Cancelled(shown, ids.toIntArray())
        }
        var isFinished = false
        val features = pictures.map { step { encode(run, it) } }
        var logits = step { prefill(run, segments, features) }
        while (ids.size < maxNewTokens) {
            val token = likeliest(logits)
            isFinished = token in BundleConstants.EOS_TOKEN_IDS
            if (isFinished) break
            ids.add(token)
            val text = tokenizer.decode(ids.toIntArray())
            if (!text.endsWith("\ufffd") && text.length > shown.length) {
                onText(text.substring(shown.length))
                shown = text
            }
            if (ids.size < maxNewTokens) logits = step { append(run, embed(run, intArrayOf(token))) }
        }
        val text = tokenizer.decode(ids.toIntArray())
        if (text.length > shown.length) onText(text.substring(shown.length))
        return Answer(text, ids.toIntArray(), isFinished)
    }

    private fun prefill(run: OrtSession.RunOptions, segments: List<IntArray>, features: List<FloatArray>): FloatArray {
        length = 0
        val parts = ArrayList<FloatArray>()
        segments.forEachIndexed { i, ids ->
            if (i > 0) parts.add(features[i - 1])
            if (ids.isNotEmpty()) parts.add(embed(run, ids))
        }
        val joined = FloatArray(parts.map { it.size }.sum())
        var at = 0
        for (part in parts) {
            System.arraycopy(part, 0, joined, at, part.size)
            at += part.size
        }
        return append(run, joined)
    }

    private fun encode(run: OrtSession.RunOptions, picture: Picture): FloatArray {
        val pixels = FloatBuffer.wrap(pixelValues(picture, imageSettings))
        val height = if (imageSettings.inGraph) picture.height else imageSettings.size
        val width = if (imageSettings.inGraph) picture.width else imageSettings.size
        return floats(pixels, longArrayOf(1, CHANNELS.toLong(), height.toLong(), width.toLong())).use {
            copied(vision.run(mapOf(PIXEL_VALUES to it), run), IMAGE_FEATURES)
        }
    }

    private fun embed(run: OrtSession.RunOptions, ids: IntArray): FloatArray {
        val values = LongBuffer.wrap(LongArray(ids.size) { ids[it].toLong() })
        return OnnxTensor.createTensor(environment, values, longArrayOf(1, ids.size.toLong())).use {
            copied(embed.run(mapOf(INPUT_IDS to it), run), INPUTS_EMBEDS)
        }
    }

    /** Append embeddings to the sequence; logits of the last position. */
    private fun append(run: OrtSession.RunOptions, embeds: FloatArray): FloatArray {
        val tokens = embeds.size / BundleConstants.HIDDEN_SIZE
        val total = length + tokens
        val shape = longArrayOf(1, tokens.toLong(), BundleConstants.HIDDEN_SIZE.toLong())
        // As long as the sequence really is, not as the cache: its length tells the positions.
        val mask = LongBuffer.wrap(LongArray(total) { 1L })
        val inputs = HashMap<String, OnnxTensor>()
        val outputs = HashMap<String, OnnxTensor>()
        cache.forEachIndexed { i, tensor ->
            // Attention writes new positions in place, so nothing is copied between steps.
            inputs[BundleConstants.CACHE_INPUTS[i]] = tensor
            outputs[BundleConstants.CACHE_OUTPUTS[i]] = tensor
        }
        floats(FloatBuffer.wrap(embeds), shape).use { embedded ->
            OnnxTensor.createTensor(environment, mask, longArrayOf(1, total.toLong())).use { attended ->
                inputs[INPUTS_EMBEDS] = embedded
                inputs[ATTENTION_MASK] = attended
                val logits = copied(decoder.run(inputs, setOf(LOGITS), outputs, run), LOGITS)
                length = total
                return logits
            }
        }
    }

    /** A tensor of the cache that holds the whole context; float16 has no type in Java and goes through bytes. */
    private fun emptyCache(): OnnxTensor {
        val shape = BundleConstants.CACHE_SHAPE.map { it.toLong() }.toLongArray()
        shape[2] = BundleConstants.CONTEXT_LENGTH.toLong()
        val (type, bytes) = when (BundleConstants.CACHE_DTYPE) {
            "float16" -> Pair(OnnxJavaType.FLOAT16, 2)
            "float32" -> Pair(OnnxJavaType.FLOAT, 4)
            else -> throw IllegalArgumentException("unknown dtype ${BundleConstants.CACHE_DTYPE}")
        }
        val size = shape.fold(bytes.toLong()) { product, n -> product * n }
        val buffer = ByteBuffer.allocateDirect(size.toInt()).order(ByteOrder.nativeOrder())
        return OnnxTensor.createTensor(environment, buffer, shape, type)
    }

    private fun floats(values: FloatBuffer, shape: LongArray) = OnnxTensor.createTensor(environment, values, shape)

    /** One output; all but the cache are released. */
    private fun copied(result: OrtSession.Result, name: String): FloatArray = result.use {
        val buffer = (it.get(name).get() as OnnxTensor).floatBuffer
        FloatArray(buffer.remaining()).also { values -> buffer.get(values) }
    }

    companion object {
        private const val PIXEL_VALUES = "pixel_values"
        private const val IMAGE_FEATURES = "image_features"
        private const val INPUT_IDS = "input_ids"
        private const val INPUTS_EMBEDS = "inputs_embeds"
        private const val ATTENTION_MASK = "attention_mask"
        private const val LOGITS = "logits"

        /** How the bundle wants its pictures. */
        val imageSettings = ImageSettings(
            BundleConstants.IMAGE_IN_GRAPH,
            BundleConstants.IMAGE_SIZE,
            BundleConstants.IMAGE_MODE,
            BundleConstants.IMAGE_RESAMPLING,
            BundleConstants.IMAGE_GROUND,
            BundleConstants.RESCALE_FACTOR,
            BundleConstants.IMAGE_MEAN,
            BundleConstants.IMAGE_STD
        )

        /** The most likely token; the first of equals. */
        fun likeliest(logits: FloatArray): Int {
            var best = 0
            for (i in logits.indices) if (logits[i] > logits[best]) best = i
            return best
        }

        private fun sha256(file: File): String =
            MessageDigest.getInstance("SHA-256").digest(file.readBytes()).joinToString("") { "%02x".format(it) }
    }
}
