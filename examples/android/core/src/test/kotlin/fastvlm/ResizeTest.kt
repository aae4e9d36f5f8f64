package fastvlm

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.junit.Assert.assertEquals
import org.junit.Assume.assumeTrue
import org.junit.Test

/**
 * Pictures of many shapes, made square in every mode with every filter, against Pillow.
 *
 * The system property `fastvlm.resized` names the file; without it there is nothing to compare with.
 */
class ResizeTest {
    @Test
    fun everyByteIsPillows() {
        val file = System.getProperty("fastvlm.resized")
        assumeTrue("the system property fastvlm.resized is not set", file != null)
        val cases = Golden.items(Json.parse(File(file).readText())).map { Golden.members(it) }
        for (case in cases) {
            val settings = ImageSettings(
                case["in_graph"] as Boolean,
                Golden.integer(case["size"]),
                case["mode"] as String,
                case["resampling"] as String,
                Golden.integers(case["ground"]),
                1 / 255.0,
                Golden.items(case["mean"]).map { it as Double },
                Golden.items(case["std"]).map { it as Double }
            )
            val name = case["name"] as String
            val picture = Golden.picture(case)
            assertEquals(name, case["square_sha256"], Golden.sha256(square(picture, settings).rgb))
            val pixels = pixelValues(picture, settings)
            val bytes = ByteBuffer.allocate(4 * pixels.size).order(ByteOrder.LITTLE_ENDIAN)
            for (value in pixels) bytes.putFloat(value)
            assertEquals(name, case["pixel_values_sha256"], Golden.sha256(bytes.array()))
        }
        println("pictures equal: ${cases.size}")
    }
}
