import XCTest

@testable import FastVLMCore

final class PictureTests: XCTestCase {
    /// 3 x 2 pixels, numbered row by row.
    private let picture = RGBImage(width: 3, height: 2, bytes: (0..<6).flatMap { [UInt8($0), 0, 9] })

    private func rows(_ image: RGBImage) -> [[UInt8]] {
        (0..<image.height).map { y in (0..<image.width).map { image.bytes[3 * (y * image.width + $0)] } }
    }

    func testPicturesAreTurnedAsPeopleSeeThem() {
        let expected: [Int: [[UInt8]]] = [
            1: [[0, 1, 2], [3, 4, 5]], 2: [[2, 1, 0], [5, 4, 3]], 3: [[5, 4, 3], [2, 1, 0]],
            4: [[3, 4, 5], [0, 1, 2]], 5: [[0, 3], [1, 4], [2, 5]], 6: [[3, 0], [4, 1], [5, 2]],
            7: [[5, 2], [4, 1], [3, 0]], 8: [[2, 5], [1, 4], [0, 3]],
        ]
        for (orientation, pixels) in expected {
            XCTAssertEqual(rows(picture.upright(orientation: orientation)), pixels, "orientation \(orientation)")
        }
    }

    func testPaddingPutsThePictureInTheMiddle() throws {
        let settings = ImageSettings(size: 3, mode: .pad, resampling: .nearest, ground: [7, 7, 7])
        XCTAssertEqual(rows(try settings.square(picture)), [[0, 1, 2], [3, 4, 5], [7, 7, 7]])
        let tall = picture.upright(orientation: 6)
        XCTAssertEqual(rows(try settings.square(tall)), [[3, 0, 7], [4, 1, 7], [5, 2, 7]])
    }

    func testCroppingKeepsTheMiddle() throws {
        let settings = ImageSettings(size: 2, mode: .crop, resampling: .nearest)
        XCTAssertEqual(rows(try settings.square(picture)), [[0, 1], [3, 4]])
        let strip = RGBImage(width: 4000, height: 1, bytes: [UInt8](repeating: 0, count: 12000))
        let large = ImageSettings(size: 1024, mode: .crop, resampling: .bicubic)
        XCTAssertThrowsError(try large.square(strip)) { error in
            XCTAssertEqual(error as? ImageError, .tooNarrowToCrop(width: 4000, height: 1))
        }
    }

    func testHalfPrecisionIsExact() {
        XCTAssertEqual(Half.float(0x3C00), 1)
        XCTAssertEqual(Half.bits(65504), 0x7BFF)
        XCTAssertEqual(Half.bits(65520), 0x7C00)
        XCTAssertEqual(Half.bits(-0x1p-24), 0x8001)
        #if !(os(macOS) && arch(x86_64))
            for bits in UInt16.min...UInt16.max {
                let expected = Float(Float16(bitPattern: bits))
                if expected.isNaN {
                    XCTAssertTrue(Half.float(bits).isNaN)
                    continue
                }
                XCTAssertEqual(Half.float(bits).bitPattern, expected.bitPattern)
                for value in [expected, expected.nextUp, expected.nextDown, expected * 1.00024, expected * 0.9998] {
                    XCTAssertEqual(Half.bits(value), Float16(value).bitPattern, "\(value)")
                }
            }
        #endif
    }
}
