package fastvlm

/**
 * An RGB picture.
 *
 * @property rgb Its pixels row by row, three bytes each, red first.
 */
class Picture(val width: Int, val height: Int, val rgb: ByteArray) {
    init {
        require(width > 0 && height > 0 && rgb.size == width * height * CHANNELS) {
            "a picture of $width x $height pixels has not ${rgb.size} bytes"
        }
    }
}

const val CHANNELS = 3

/**
 * How pictures become the encoder's input; [BundleConstants] says how for the bundle at hand.
 *
 * @property inGraph Whether the vision graph does all that follows, and is given the picture in its own size.
 * @property size Edge of the square input in pixels.
 * @property mode `pad` keeps the whole picture and fills two sides, `crop` takes the center.
 * @property resampling Pillow's filter.
 * @property ground Color that `pad` fills with: red, green, blue.
 * @property rescaleFactor What 8-bit values are multiplied by.
 * @property mean Subtracted from the rescaled values then, by channel.
 * @property std What they are divided by last, by channel.
 */
class ImageSettings(
    val inGraph: Boolean,
    val size: Int,
    val mode: String,
    val resampling: String,
    val ground: List<Int>,
    val rescaleFactor: Double,
    val mean: List<Double>,
    val std: List<Double>
)

/** A picture of more pixels than this is not made from a narrow strip. */
private const val MAX_PIXELS = 64_000_000L

/** Make a picture `size` x `size`, with the very bytes that `fastvlm-convert` computes. */
fun square(picture: Picture, settings: ImageSettings): Picture = when (settings.mode) {
    "pad" -> padded(picture, settings)
    "crop" -> cropped(picture, settings)
    else -> throw IllegalArgumentException("unknown image mode '${settings.mode}'")
}

/**
 * What the vision graph is given: float [1, 3, size, size], channel by channel; or [1, 3, height, width] in 0..1
 * where it prepares pictures itself.
 *
 * The product is taken in double precision and rounded once, the normalization in single precision, as
 * `fastvlm-convert` does.
 */
fun pixelValues(picture: Picture, settings: ImageSettings): FloatArray {
    val given = if (settings.inGraph) picture else square(picture, settings)
    val plane = given.width * given.height
    val found = FloatArray(CHANNELS * plane)
    val rescaleFactor = if (settings.inGraph) 1.0 / 255 else settings.rescaleFactor
    val isNormalized = !settings.inGraph && (settings.mean.any { it != 0.0 } || settings.std.any { it != 1.0 })
    for (channel in 0 until CHANNELS) {
        val mean = settings.mean[channel].toFloat()
        val std = settings.std[channel].toFloat()
        val table = FloatArray(256) { value ->
            val scaled = (value * rescaleFactor).toFloat()
            if (isNormalized) (scaled - mean) / std else scaled
        }
        for (i in 0 until plane) found[channel * plane + i] = table[given.rgb[i * CHANNELS + channel].toInt() and 255]
    }
    return found
}

/** Pad to a square and resize, row by row: the padded square of a long, narrow picture is never held. */
private fun padded(picture: Picture, settings: ImageSettings): Picture {
    val size = settings.size
    val edge = maxOf(picture.width, picture.height)
    val left = (edge - picture.width) / 2
    val above = (edge - picture.height) / 2
    val ground = ByteArray(edge * CHANNELS) { settings.ground[it % CHANNELS].toByte() }
    val columns = Resampler(settings.resampling, edge, size)
    val narrowed = ByteArray(size * edge * CHANNELS) { settings.ground[it % CHANNELS].toByte() }
    val row = ground.copyOf()
    for (y in 0 until picture.height) {
        System.arraycopy(picture.rgb, y * picture.width * CHANNELS, row, left * CHANNELS, picture.width * CHANNELS)
        columns.row(row, 0, narrowed, (above + y) * size * CHANNELS, 0, size)
    }
    val found = ByteArray(size * size * CHANNELS)
    Resampler(settings.resampling, edge, size).columns(narrowed, size, found, 0, size)
    return Picture(size, size, found)
}

/** Resize the shorter edge, then cut the center out; only what stays is computed. */
private fun cropped(picture: Picture, settings: ImageSettings): Picture {
    val size = settings.size
    val short = minOf(picture.width, picture.height)
    val width = (size.toLong() * picture.width / short).toInt()
    val height = (size.toLong() * picture.height / short).toInt()
    require(width.toLong() * height <= MAX_PIXELS) {
        "a picture of ${picture.width} x ${picture.height} pixels is too narrow to crop $size x $size from it"
    }
    val columns = Resampler(settings.resampling, picture.width, width)
    val narrowed = ByteArray(size * picture.height * CHANNELS)
    for (y in 0 until picture.height) {
        val from = y * picture.width * CHANNELS
        columns.row(picture.rgb, from, narrowed, y * size * CHANNELS, (width - size) / 2, size)
    }
    val found = ByteArray(size * size * CHANNELS)
    Resampler(settings.resampling, picture.height, height).columns(narrowed, size, found, (height - size) / 2, size)
    return Picture(size, size, found)
}
