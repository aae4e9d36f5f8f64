package fastvlm

import org.junit.Assert.assertEquals
import org.junit.Test

/** Texts that tokenizers get wrong, on their own and in a prompt. */
class TokenizerTest {
    @Test
    fun textsHaveTheSameTokens() {
        for (entry in Golden.texts) {
            val text = entry["text"] as String
            val ids = Golden.tokenizer.encode(text)
            assertEquals(text, Golden.integers(entry["token_ids"]), ids.toList())
            assertEquals(entry["decoded"], Golden.tokenizer.decode(ids))
            assertEquals(text, Golden.segments(entry["segments"]), Golden.prompt(text))
        }
        println("texts equal: ${Golden.texts.size}")
    }

    @Test
    fun halfACharacterIsReplaced() {
        for (entry in Golden.texts) {
            val ids = Golden.integers(entry["token_ids"])
            val text = Golden.tokenizer.decode(ids.toIntArray())
            for (count in ids.indices) {
                val part = Golden.tokenizer.decode(ids.take(count).toIntArray())
                assertEquals(text, true, text.startsWith(part.trimEnd('\ufffd')))
            }
        }
    }
}
