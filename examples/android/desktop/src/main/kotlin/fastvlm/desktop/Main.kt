package fastvlm.desktop

import fastvlm.CHANNELS
import fastvlm.FastVlm
import fastvlm.Picture
import java.io.File
import javax.imageio.ImageIO
import kotlin.system.exitProcess

/** Ask a bundle about a picture on a desktop: `BUNDLE PICTURE QUESTION`. */
fun main(arguments: Array<String>) {
    if (arguments.size != 3) {
        System.err.println("usage: BUNDLE PICTURE QUESTION")
        exitProcess(2)
    }
    FastVlm(File(arguments[0]), Runtime.getRuntime().availableProcessors()).use { model ->
        model.ask(readPicture(File(arguments[1])), arguments[2], MAX_NEW_TOKENS) { piece ->
            print(piece)
            System.out.flush()
        }
    }
    println()
}

private const val MAX_NEW_TOKENS = 256

/** Decode a PNG, JPEG, GIF or BMP file; a photo's orientation is not looked at. */
fun readPicture(file: File): Picture {
    val image = requireNotNull(ImageIO.read(file)) { "$file is no picture of a known format" }
    val rgb = ByteArray(image.width * image.height * CHANNELS)
    for (y in 0 until image.height) {
        for (x in 0 until image.width) {
            val color = image.getRGB(x, y)
            val at = (y * image.width + x) * CHANNELS
            for (channel in 0 until CHANNELS) rgb[at + channel] = (color shr (16 - 8 * channel)).toByte()
        }
    }
    return Picture(image.width, image.height, rgb)
}
