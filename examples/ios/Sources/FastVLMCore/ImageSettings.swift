/// A picture that cannot be prepared.
public enum ImageError: Error, Equatable {
    /// Cropping a square from so narrow a strip would blow it up absurdly.
    case tooNarrowToCrop(width: Int, height: Int)
    /// The picture cannot be decoded or drawn.
    case unreadable
}

/// How a picture becomes the encoder's input.
public struct ImageSettings: Equatable, Sendable {
    public enum Mode: String, Sendable {
        /// The whole picture, with ground on two sides.
        case pad
        /// The middle of the longer edge.
        case crop
    }

    public let size: Int
    public let mode: Mode
    public let resampling: Resampling
    /// What `pad` adds: red, green, blue.
    public let ground: [UInt8]
    public let rescaleFactor: Double
    public let mean: [Double]
    public let std: [Double]

    public init(
        size: Int, mode: Mode, resampling: Resampling, ground: [UInt8] = [0, 0, 0],
        rescaleFactor: Double = 1.0 / 255, mean: [Double] = [0, 0, 0], std: [Double] = [1, 1, 1]
    ) {
        self.size = size
        self.mode = mode
        self.resampling = resampling
        self.ground = ground
        self.rescaleFactor = rescaleFactor
        self.mean = mean
        self.std = std
    }

    private static let mostPixels = 64_000_000

    /// The picture as a square of `size`.
    public func square(_ picture: RGBImage) throws -> RGBImage {
        switch mode {
        case .pad: padded(picture).resized(width: size, height: size, resampling)
        case .crop: try cropped(picture)
        }
    }

    /// What an encoder that takes numbers reads: `[1, 3, size, size]`, red first.
    public func pixelValues(_ picture: RGBImage) throws -> [Float] {
        let bytes = try square(picture).bytes
        let isNormalized = mean.contains { $0 != 0 } || std.contains { $0 != 1 }
        return (0..<3).flatMap { channel in
            stride(from: channel, to: bytes.count, by: 3).map { index in
                let value = Float(Double(bytes[index]) * rescaleFactor)
                return isNormalized ? (value - Float(mean[channel])) / Float(std[channel]) : value
            }
        }
    }

    /// Ground on two sides, resized as far as rows go; the caller does the columns.
    private func padded(_ picture: RGBImage) -> RGBImage {
        let edge = max(picture.width, picture.height)
        return picture.width == edge ? paddedAbove(picture, edge) : paddedBeside(picture, edge)
    }

    private func paddedAbove(_ picture: RGBImage, _ edge: Int) -> RGBImage {
        // Rows are shrunk before the ground comes: a long, narrow picture would make a huge square.
        let narrow = picture.resized(width: size, height: picture.height, resampling)
        let above = (edge - picture.height) / 2
        let line = [[UInt8]](repeating: ground, count: size).flatMap { $0 }
        var bytes: [UInt8] = []
        bytes.reserveCapacity(3 * size * edge)
        for _ in 0..<above { bytes += line }
        bytes += narrow.bytes
        for _ in (above + picture.height)..<edge { bytes += line }
        return RGBImage(width: size, height: edge, bytes: bytes)
    }

    private func paddedBeside(_ picture: RGBImage, _ edge: Int) -> RGBImage {
        let rowBytes = 3 * picture.width
        let left = 3 * ((edge - picture.width) / 2)
        let taps = resampling.taps(from: edge, to: size)
        // One row at a time is as wide as the square.
        var row = [[UInt8]](repeating: ground, count: edge).flatMap { $0 }
        var bytes: [UInt8] = []
        bytes.reserveCapacity(3 * size * edge)
        for y in 0..<edge {
            row.replaceSubrange(left..<(left + rowBytes), with: picture.bytes[(y * rowBytes)..<((y + 1) * rowBytes)])
            if size == edge {
                bytes += row
            } else {
                row.withUnsafeBufferPointer { RGBImage.append($0, from: 0, taps, to: &bytes) }
            }
        }
        return RGBImage(width: size, height: edge, bytes: bytes)
    }

    /// The shorter edge is resized to `size`, then the middle is cut out.
    private func cropped(_ picture: RGBImage) throws -> RGBImage {
        let short = min(picture.width, picture.height)
        let (width, height) = (size * picture.width / short, size * picture.height / short)
        guard width * height <= Self.mostPixels else {
            throw ImageError.tooNarrowToCrop(width: picture.width, height: picture.height)
        }
        let resized = picture.resized(width: width, height: height, resampling)
        return resized.cropped(left: (width - size) / 2, top: (height - size) / 2, width: size, height: size)
    }
}
