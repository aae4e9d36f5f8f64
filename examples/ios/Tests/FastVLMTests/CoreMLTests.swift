#if canImport(CoreML)
    import CoreGraphics
    import CoreML
    import FastVLMCore
    import Foundation
    import GoldenVectors
    import XCTest

    @testable import FastVLM

    /// The bundle on this machine's Core ML against what its own runtime computed.
    final class CoreMLTests: XCTestCase {
        private func golden() throws -> (bundle: URL, vectors: GoldenVectors) {
            guard let bundle = GoldenVectors.bundle, let vectors = try GoldenVectors.load() else {
                throw XCTSkip("FASTVLM_BUNDLE or FASTVLM_VECTORS is not set")
            }
            return (bundle, vectors)
        }

        private func check(
            _ found: [Float], _ expected: GoldenVectors.Sampled, _ name: String, line: UInt = #line
        ) {
            XCTAssertEqual(found.count, expected.shape.reduce(1, *), name, line: line)
            for (index, value) in zip(expected.indices, expected.values) where index < found.count {
                XCTAssertEqual(found[index], value, accuracy: expected.tolerance, name, line: line)
            }
        }

        func testFeaturesAndLogits() async throws {
            let (bundle, vectors) = try golden()
            let files = try await BundleFiles.compiled(folder: bundle)
            let session = try CoreMLSession(vision: files.vision, decoder: files.decoder)
            for item in vectors.cases {
                let features = try session.encode(item.picture.image)
                check(features, item.image_features, item.name)
                let rows =
                    try session.embed(item.segments[0]) + features + session.embed(item.segments[1])
                check(try session.prefill(rows), item.first_logits, item.name)
            }
        }

        /// Up to a token that was so close to another that rounding decides.
        func testAnswers() async throws {
            let (bundle, vectors) = try golden()
            let assistant = try await Assistant.open(BundleFiles.compiled(folder: bundle))
            for item in vectors.cases {
                let answer = try await assistant.answer(
                    [.question(item.question, about: [item.picture.image])], maxNewTokens: 48)
                let sure = item.margins.prefix { $0 > item.first_logits.tolerance }.count
                XCTAssertEqual(answer.tokens.prefix(sure), item.token_ids.prefix(sure), item.name)
                if sure == item.margins.count { XCTAssertEqual(answer.text, item.text, item.name) }
            }
        }

        func testPicturesAreReadAsTheyAre() throws {
            let (_, vectors) = try golden()
            for item in vectors.cases {
                let picture = item.picture.image
                var pixels: [UInt8] = []
                for start in stride(from: 0, to: picture.bytes.count, by: 3) {
                    pixels += picture.bytes[start..<(start + 3)]
                    pixels.append(255)
                }
                let space = try XCTUnwrap(CGColorSpace(name: CGColorSpace.sRGB))
                let provider = try XCTUnwrap(CGDataProvider(data: Data(pixels) as CFData))
                let image = CGImage(
                    width: picture.width, height: picture.height, bitsPerComponent: 8, bitsPerPixel: 32,
                    bytesPerRow: 4 * picture.width, space: space,
                    bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.noneSkipLast.rawValue),
                    provider: provider, decode: nil, shouldInterpolate: false, intent: .defaultIntent)
                XCTAssertEqual(try RGBImage(XCTUnwrap(image)), picture)
            }
        }

        func testArraysKeepTheirValues() throws {
            let values: [Float] = [0, 1, -2.5, 65504, 0x1p-24, 100]
            for dtype in ["float16", "float32"] {
                let array = try CoreMLSession.array(values, [1, 2, 3], dtype)
                XCTAssertEqual(try CoreMLSession.floats(of: array), values)
            }
        }
    }
#endif
