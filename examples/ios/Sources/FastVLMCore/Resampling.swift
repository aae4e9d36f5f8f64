import Foundation

/// Pillow's filters, to the bit: other resizing gives the model other pixels, and now and then another answer.
public enum Resampling: String, Sendable {
    case nearest, box, bilinear, hamming, bicubic, lanczos

    /// How far a pixel reaches, in pixels of the result.
    private var support: Double {
        switch self {
        case .nearest, .box: 0.5
        case .bilinear, .hamming: 1
        case .bicubic: 2
        case .lanczos: 3
        }
    }

    private func weight(_ distance: Double) -> Double {
        let x = abs(distance)
        switch self {
        case .nearest, .box:
            return distance > -0.5 && distance <= 0.5 ? 1 : 0
        case .bilinear:
            return x < 1 ? 1 - x : 0
        case .hamming:
            if x == 0 { return 1 }
            if x >= 1 { return 0 }
            let angle = x * Double.pi
            return sin(angle) / angle * (0.54 + 0.46 * cos(angle))
        case .bicubic:
            let a = -0.5
            if x < 1 { return ((a + 2) * x - (a + 3)) * x * x + 1 }
            if x < 2 { return (((x - 5) * x + 8) * x - 4) * a }
            return 0
        case .lanczos:
            return distance >= -3 && distance < 3 ? Self.sinc(distance) * Self.sinc(distance / 3) : 0
        }
    }

    private static func sinc(_ x: Double) -> Double {
        x == 0 ? 1 : sin(x * Double.pi) / (x * Double.pi)
    }

    /// What each pixel of a resized line is made of.
    func taps(from count: Int, to newCount: Int) -> [Taps] {
        let scale = Double(count) / Double(newCount)
        if self == .nearest {
            return (0..<newCount).map { index in
                Taps(first: min(count - 1, Int((Double(index) + 0.5) * scale)), weights: [1 << Taps.bits])
            }
        }
        let stretch = max(scale, 1)
        let reach = support * stretch
        let perPixel = 1 / stretch
        return (0..<newCount).map { index in
            let center = (Double(index) + 0.5) * scale
            let first = max(0, Int(center - reach + 0.5))
            let end = min(count, Int(center + reach + 0.5))
            var weights = (first..<end).map { weight((Double($0) - center + 0.5) * perPixel) }
            let total = weights.reduce(0, +)
            if total != 0 { weights = weights.map { $0 / total } }
            let fixed = weights.map { Int(($0 < 0 ? -0.5 : 0.5) + $0 * Double(1 << Taps.bits)) }
            return Taps(first: first, weights: fixed)
        }
    }
}

/// The pixels that one pixel of a resized line is made of, from the first on, with weights in fixed point.
struct Taps {
    static let bits = 22

    let first: Int
    let weights: [Int]

    /// The sum over pixels that lie `stride` bytes apart, rounded to 8 bits.
    func sum(_ bytes: UnsafeBufferPointer<UInt8>, at offset: Int, stride: Int) -> UInt8 {
        var total = 1 << (Self.bits - 1)
        var place = offset + first * stride
        for weight in weights {
            total += Int(bytes[place]) * weight
            place += stride
        }
        return UInt8(clamping: total >> Self.bits)
    }
}

extension RGBImage {
    /// The picture in another size: rows first, then columns, with 8 bits between, as Pillow does it.
    public func resized(width newWidth: Int, height newHeight: Int, _ filter: Resampling) -> RGBImage {
        narrowed(to: newWidth, filter).lowered(to: newHeight, filter)
    }

    private func narrowed(to newWidth: Int, _ filter: Resampling) -> RGBImage {
        if newWidth == width { return self }
        let taps = filter.taps(from: width, to: newWidth)
        var result: [UInt8] = []
        result.reserveCapacity(3 * newWidth * height)
        bytes.withUnsafeBufferPointer { source in
            for y in 0..<height { Self.append(source, from: 3 * y * width, taps, to: &result) }
        }
        return RGBImage(width: newWidth, height: height, bytes: result)
    }

    /// Appends one row, made of the row that begins at an offset.
    static func append(
        _ source: UnsafeBufferPointer<UInt8>, from start: Int, _ taps: [Taps], to result: inout [UInt8]
    ) {
        for pixel in taps {
            for channel in 0..<3 { result.append(pixel.sum(source, at: start + channel, stride: 3)) }
        }
    }

    private func lowered(to newHeight: Int, _ filter: Resampling) -> RGBImage {
        if newHeight == height { return self }
        let taps = filter.taps(from: height, to: newHeight)
        let rowBytes = 3 * width
        var result = [UInt8](repeating: 0, count: rowBytes * newHeight)
        bytes.withUnsafeBufferPointer { source in
            for y in 0..<newHeight {
                for offset in 0..<rowBytes {
                    result[y * rowBytes + offset] = taps[y].sum(source, at: offset, stride: rowBytes)
                }
            }
        }
        return RGBImage(width: width, height: newHeight, bytes: result)
    }
}
