/// A picture as 8-bit RGB, row by row, red first.
public struct RGBImage: Equatable, Sendable {
    public let width: Int
    public let height: Int
    /// `width * height * 3` bytes.
    public let bytes: [UInt8]

    public init(width: Int, height: Int, bytes: [UInt8]) {
        precondition(width > 0 && height > 0 && bytes.count == width * height * 3)
        self.width = width
        self.height = height
        self.bytes = bytes
    }

    /// The picture as people see it.
    ///
    /// - Parameter orientation: EXIF's number, 1 to 8: how the picture lies in its file.
    public func upright(orientation: Int) -> RGBImage {
        guard (2...8).contains(orientation) else { return self }
        let isTurned = orientation >= 5
        let (newWidth, newHeight) = isTurned ? (height, width) : (width, height)
        var turned = [UInt8](repeating: 0, count: bytes.count)
        for y in 0..<newHeight {
            for x in 0..<newWidth {
                let (sourceX, sourceY): (Int, Int)
                switch orientation {
                case 2: (sourceX, sourceY) = (width - 1 - x, y)
                case 3: (sourceX, sourceY) = (width - 1 - x, height - 1 - y)
                case 4: (sourceX, sourceY) = (x, height - 1 - y)
                case 5: (sourceX, sourceY) = (y, x)
                case 6: (sourceX, sourceY) = (y, height - 1 - x)
                case 7: (sourceX, sourceY) = (width - 1 - y, height - 1 - x)
                default: (sourceX, sourceY) = (width - 1 - y, x)
                }
                let (from, to) = (3 * (sourceY * width + sourceX), 3 * (y * newWidth + x))
                for channel in 0..<3 { turned[to + channel] = bytes[from + channel] }
            }
        }
        return RGBImage(width: newWidth, height: newHeight, bytes: turned)
    }

    /// A rectangle of it.
    func cropped(left: Int, top: Int, width newWidth: Int, height newHeight: Int) -> RGBImage {
        var kept: [UInt8] = []
        kept.reserveCapacity(3 * newWidth * newHeight)
        for y in top..<(top + newHeight) {
            let start = 3 * (y * width + left)
            kept += bytes[start..<(start + 3 * newWidth)]
        }
        return RGBImage(width: newWidth, height: newHeight, bytes: kept)
    }
}
