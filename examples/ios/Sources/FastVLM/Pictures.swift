#if canImport(CoreGraphics) && canImport(ImageIO)
    import CoreGraphics
    import FastVLMCore
    import Foundation
    import ImageIO

    extension RGBImage {
        /// The picture in a file, upright, on white where it is transparent.
        public init(contentsOf url: URL) throws {
            try self.init(data: Data(contentsOf: url))
        }

        /// The picture in a file's content, upright, on white where it is transparent.
        public init(data: Data) throws {
            guard let source = CGImageSourceCreateWithData(data as CFData, nil),
                let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
            else { throw ImageError.unreadable }
            let properties = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any]
            let orientation = properties?[kCGImagePropertyOrientation] as? Int ?? 1
            self = try RGBImage(image).upright(orientation: orientation)
        }

        /// A picture as it is, in sRGB; `upright` turns it if its orientation is known apart.
        public init(_ image: CGImage) throws {
            let (width, height) = (image.width, image.height)
            var pixels = [UInt8](repeating: 0, count: 4 * width * height)
            try pixels.withUnsafeMutableBytes { bytes in
                guard let space = CGColorSpace(name: CGColorSpace.sRGB),
                    let context = CGContext(
                        data: bytes.baseAddress, width: width, height: height, bitsPerComponent: 8,
                        bytesPerRow: 4 * width, space: space,
                        bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
                else { throw ImageError.unreadable }
                let all = CGRect(x: 0, y: 0, width: width, height: height)
                context.setFillColor(CGColor(srgbRed: 1, green: 1, blue: 1, alpha: 1))
                context.fill(all)
                context.draw(image, in: all)
            }
            var rgb = [UInt8](repeating: 0, count: 3 * width * height)
            for pixel in 0..<(width * height) {
                for channel in 0..<3 { rgb[3 * pixel + channel] = pixels[4 * pixel + channel] }
            }
            self.init(width: width, height: height, bytes: rgb)
        }
    }
#endif
