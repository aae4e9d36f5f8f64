package fastvlm

import kotlin.math.abs

/** Bits behind the binary point of a weight: 32 without those of a value, and two for the filter's overshoot. */
private const val PRECISION_BITS = 32 - 8 - 2

/**
 * Pillow's resampling of 8-bit values along one axis, bit for bit (`libImaging/Resample.c`).
 *
 * Weights are computed in double precision and rounded to integers, sums are integers, and each axis rounds to
 * eight bits on its own.
 *
 * @param resampling The filter: bicubic, bilinear, lanczos, hamming, box or nearest.
 * @param inSize Length of the axis.
 * @param outSize Its length afterwards.
 */
class Resampler(resampling: String, private val inSize: Int, private val outSize: Int) {
    private val starts = IntArray(outSize)
    private val weights: Array<IntArray>

    init {
        weights = when {
            inSize == outSize -> copies { it }
            resampling == "nearest" -> nearest()
            else -> filtered(FILTERS[resampling] ?: throw IllegalArgumentException("unknown filter '$resampling'"))
        }
    }

    /**
     * Resample one row.
     *
     * @param from The row begins there in `source`.
     * @param to The result begins there in `target`.
     * @param first First column of the result to compute.
     * @param count How many.
     */
    fun row(source: ByteArray, from: Int, target: ByteArray, to: Int, first: Int, count: Int) {
        for (x in 0 until count) {
            blend(source, from + starts[first + x] * CHANNELS, CHANNELS, weights[first + x], target, to + x * CHANNELS)
        }
    }

    /**
     * Resample all columns of a picture.
     *
     * @param width Columns of `source` and of `target`.
     * @param first First row of the result to compute.
     * @param count How many.
     */
    fun columns(source: ByteArray, width: Int, target: ByteArray, first: Int, count: Int) {
        val stride = width * CHANNELS
        for (y in 0 until count) {
            val start = starts[first + y] * stride
            for (x in 0 until width) {
                blend(source, start + x * CHANNELS, stride, weights[first + y], target, y * stride + x * CHANNELS)
            }
        }
    }

    private fun blend(source: ByteArray, from: Int, step: Int, weights: IntArray, target: ByteArray, to: Int) {
        var red = 1 shl (PRECISION_BITS - 1)
        var green = red
        var blue = red
        var at = from
        for (weight in weights) {
            red += (source[at].toInt() and 255) * weight
            green += (source[at + 1].toInt() and 255) * weight
            blue += (source[at + 2].toInt() and 255) * weight
            at += step
        }
        target[to] = eightBits(red)
        target[to + 1] = eightBits(green)
        target[to + 2] = eightBits(blue)
    }

    private fun eightBits(sum: Int): Byte = (sum shr PRECISION_BITS).coerceIn(0, 255).toByte()

    /** Every value is that of one place. */
    private fun copies(place: (Int) -> Int): Array<IntArray> = Array(outSize) { x ->
        starts[x] = place(x)
        intArrayOf(1 shl PRECISION_BITS)
    }

    /** Pillow adds the step up, rounding each time, so this does. */
    private fun nearest(): Array<IntArray> {
        val step = inSize.toDouble() / outSize
        var center = step * 0.5
        return copies {
            val place = center.toInt()
            center += step
            place
        }
    }

    private fun filtered(filter: Filter): Array<IntArray> {
        val scale = inSize.toDouble() / outSize
        val stretch = maxOf(scale, 1.0)
        val support = filter.support * stretch
        val shrink = 1.0 / stretch
        return Array(outSize) { x ->
            val center = (x + 0.5) * scale
            val first = maxOf((center - support + 0.5).toInt(), 0)
            val behind = minOf((center + support + 0.5).toInt(), inSize)
            starts[x] = first
            val exact = DoubleArray(behind - first) { filter.weight((it + first - center + 0.5) * shrink) }
            var sum = 0.0
            for (weight in exact) sum += weight
            IntArray(exact.size) { rounded(if (sum != 0.0) exact[it] / sum else exact[it]) }
        }
    }

    private fun rounded(weight: Double): Int {
        val scaled = weight * (1 shl PRECISION_BITS)
        return (if (weight < 0) scaled - 0.5 else scaled + 0.5).toInt()
    }
}

/** A filter's reach to either side, and its weight at a distance from the center. */
private class Filter(val support: Double, val weight: (Double) -> Double)

private val FILTERS = mapOf(
    "box" to Filter(0.5) { x -> if (x > -0.5 && x <= 0.5) 1.0 else 0.0 },
    "bilinear" to Filter(1.0) { x -> maxOf(1.0 - abs(x), 0.0) },
    "hamming" to Filter(1.0) { x -> hamming(abs(x)) },
    "bicubic" to Filter(2.0) { x -> bicubic(abs(x)) },
    "lanczos" to Filter(3.0) { x -> if (x >= -3.0 && x < 3.0) sinc(x) * sinc(x / 3) else 0.0 }
)

private fun bicubic(x: Double): Double {
    val a = -0.5
    return when {
        x < 1.0 -> ((a + 2.0) * x - (a + 3.0)) * x * x + 1
        x < 2.0 -> (((x - 5) * x + 8) * x - 4) * a
        else -> 0.0
    }
}

private fun hamming(x: Double): Double {
    if (x == 0.0) return 1.0
    if (x >= 1.0) return 0.0
    val angle = x * Math.PI
    return StrictMath.sin(angle) / angle * (0.54 + 0.46 * StrictMath.cos(angle))
}

private fun sinc(x: Double): Double {
    if (x == 0.0) return 1.0
    val angle = x * Math.PI
    return StrictMath.sin(angle) / angle
}
