package fastvlm

import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.concurrent.CountDownLatch
import kotlin.concurrent.thread
import org.junit.AfterClass
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertTrue
import org.junit.Test

/** Every step of the app against what `fastvlm-convert` computed with the same bundle. */
class GoldenTest {
    @Test
    fun vectorsBelongToTheBundle() {
        assertEquals(BundleConstants.MANIFEST_SHA256, Golden.root["manifest_sha256"])
    }

    @Test
    fun picturesAreResizedToTheSameBytes() {
        for (case in Golden.cases) {
            val square = square(Golden.picture(case), FastVlm.imageSettings)
            assertEquals(case["name"] as String, case["square_sha256"], Golden.sha256(square.rgb))
        }
    }

    @Test
    fun pixelValuesAreTheSameBits() {
        for (case in Golden.cases) {
            val pixels = pixelValues(Golden.picture(case), FastVlm.imageSettings)
            Golden.check("pixel_values", case["pixel_values"], pixels)
            val bytes = ByteBuffer.allocate(4 * pixels.size).order(ByteOrder.LITTLE_ENDIAN)
            for (value in pixels) bytes.putFloat(value)
            assertEquals(case["name"] as String, case["pixel_values_sha256"], Golden.sha256(bytes.array()))
        }
    }

    @Test
    fun promptsHaveTheSameTokens() {
        for (case in Golden.cases) {
            assertEquals(Golden.segments(case["segments"]), Golden.prompt(case["question"] as String))
        }
    }

    @Test
    fun featuresAndFirstLogitsAgree() {
        for (case in Golden.cases) {
            val features = model.encodeImage(Golden.picture(case))
            Golden.check("image_features", case["image_features"], features)
            val segments = Golden.segments(case["segments"]).map { it.toIntArray() }
            val logits = model.prefill(segments, listOf(features))
            Golden.check("first_logits", case["first_logits"], logits)
            assertEquals(Golden.integers(case["top_token_ids"])[0], FastVlm.likeliest(logits))
        }
    }

    @Test
    fun answersHaveTheSameTokens() {
        var equal = 0
        var total = 0
        for (case in Golden.cases) {
            val pieces = ArrayList<String>()
            val limit = maxOf(1, minOf(MAX_NEW_TOKENS, BundleConstants.CONTEXT_LENGTH - promptTokens(case)))
            val answer = model.ask(Golden.picture(case), case["question"] as String, limit) { pieces.add(it) }
            val golden = Golden.integers(case["token_ids"])
            assertEquals(case["name"] as String, golden, answer.tokenIds.toList())
            assertEquals(case["text"], answer.text)
            assertEquals(case["text"], pieces.joinToString(""))
            assertEquals(case["finished"], answer.isFinished)
            equal += answer.tokenIds.toList().zip(golden).count { (ours, theirs) -> ours == theirs }
            total += golden.size
        }
        println("tokens equal: $equal of $total in ${Golden.cases.size} answers")
    }

    @Test
    fun anAnswerCanBeCancelledWhileItComes() {
        val case = Golden.cases[0]
        val answer = model.ask(Golden.picture(case), case["question"] as String, MAX_NEW_TOKENS) { model.cancel() }
        assertFalse(answer.isFinished)
        assertTrue(answer.tokenIds.size in 1 until maxOf(2, Golden.integers(case["token_ids"]).size))
        again(case)
    }

    @Test
    fun anAnswerCanBeCancelledWithinThePrompt() {
        val case = Golden.cases[0]
        val started = CountDownLatch(1)
        var answer: Answer? = null
        val worker = thread {
            started.countDown()
            answer = model.ask(Golden.picture(case), case["question"] as String, MAX_NEW_TOKENS) {}
        }
        started.await()
        while (worker.isAlive) {
            model.cancel()
            Thread.sleep(1)
        }
        assertFalse(answer!!.isFinished)
        again(case)
    }

    @Test
    fun whatDoesNotFitIsRefused() {
        val limit = BundleConstants.CONTEXT_LENGTH
        try {
            model.ask(null, "Hi", limit) {}
        } catch (error: IllegalArgumentException) {
            assertTrue(error.message!!.contains("exceed the context of $limit tokens"))
            return
        }
        throw AssertionError("a prompt and an answer that exceed the context were accepted")
    }

    /** A cancelled answer leaves nothing behind. */
    private fun again(case: Map<String, Any?>) {
        val answer = model.ask(Golden.picture(case), case["question"] as String, MAX_NEW_TOKENS) {}
        assertEquals(Golden.integers(case["token_ids"]), answer.tokenIds.toList())
    }

    private fun promptTokens(case: Map<String, Any?>): Int =
        Golden.segments(case["segments"]).map { it.size }.sum() + BundleConstants.NUM_IMAGE_TOKENS

    companion object {
        private const val MAX_NEW_TOKENS = 48
        private val model by lazy { FastVlm(Golden.bundle, 2) }

        @AfterClass
        @JvmStatic
        fun close() = model.close()
    }
}
