package fastvlm.app

import android.content.ContentResolver
import android.graphics.Bitmap
import android.graphics.Color
import android.graphics.ColorSpace
import android.graphics.ImageDecoder
import android.net.Uri
import fastvlm.CHANNELS
import fastvlm.Picture

/** Decode a picture upright, in sRGB. */
fun readPicture(resolver: ContentResolver, uri: Uri): Picture =
    picture(
        ImageDecoder.decodeBitmap(ImageDecoder.createSource(resolver, uri)) { decoder, _, _ ->
            decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE // pixels can be read
            decoder.setTargetColorSpace(ColorSpace.get(ColorSpace.Named.SRGB))
        }
    )

/** The pixels of a bitmap; what is transparent is laid on white, as `fastvlm-convert` does. */
fun picture(bitmap: Bitmap): Picture {
    val rgb = ByteArray(bitmap.width * bitmap.height * CHANNELS)
    val row = IntArray(bitmap.width)
    var at = 0
    for (y in 0 until bitmap.height) {
        bitmap.getPixels(row, 0, bitmap.width, 0, y, bitmap.width, 1)
        for (color in row) {
            val alpha = Color.alpha(color)
            rgb[at++] = onWhite(Color.red(color), alpha)
            rgb[at++] = onWhite(Color.green(color), alpha)
            rgb[at++] = onWhite(Color.blue(color), alpha)
        }
    }
    return Picture(bitmap.width, bitmap.height, rgb)
}

private fun onWhite(value: Int, alpha: Int): Byte = ((value * alpha + 255 * (255 - alpha) + 127) / 255).toByte()
