import Foundation
import GoldenVectors
import XCTest

@testable import FastVLMCore

/// The core against what the bundle's own runtime was given and gave.
final class GoldenVectorsTests: XCTestCase {
    private func vectors() throws -> GoldenVectors {
        guard let found = try GoldenVectors.load() else { throw XCTSkip("FASTVLM_VECTORS is not set") }
        return found
    }

    private func tokenizer() throws -> Tokenizer {
        guard let bundle = GoldenVectors.bundle else { throw XCTSkip("FASTVLM_BUNDLE is not set") }
        return try Tokenizer(json: Data(contentsOf: bundle.appendingPathComponent("tokenizer.json")))
    }

    func testSHA256() {
        XCTAssertEqual(
            sha256(Array("abc".utf8)), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    }

    func testTextsBecomeTheSameTokens() throws {
        let (tokenizer, vectors) = (try self.tokenizer(), try self.vectors())
        XCTAssertFalse(vectors.texts.isEmpty)
        for text in vectors.texts {
            let ids = try tokenizer.encode([TextPiece(text.text)])
            XCTAssertEqual(ids, text.token_ids, text.text.debugDescription)
            XCTAssertEqual(
                Array(tokenizer.decode(ids).unicodeScalars), Array(text.decoded.unicodeScalars),
                text.text.debugDescription)
        }
    }

    func testTextsBecomeTheSamePrompts() throws {
        let (tokenizer, vectors) = (try self.tokenizer(), try self.vectors())
        let dot = RGBImage(width: 1, height: 1, bytes: [0, 0, 0])
        for text in vectors.texts {
            let prompt = try Prompt(
                [.question(text.text, about: [dot])], format: BundleConstants.promptFormat, tokenizer: tokenizer)
            XCTAssertEqual(prompt.segments, text.segments, text.text.debugDescription)
        }
    }

    func testPicturesBecomeTheSamePixels() throws {
        let settings = BundleConstants.imageSettings
        for golden in try self.vectors().cases {
            let square = try settings.square(golden.picture.image)
            XCTAssertEqual(sha256(square.bytes), golden.square_sha256, golden.name)
            let values = try settings.pixelValues(golden.picture.image)
            let bytes: [UInt8] = values.map(\.bitPattern.littleEndian).withUnsafeBytes { Array($0) }
            XCTAssertEqual(sha256(bytes), golden.pixel_values_sha256, golden.name)
        }
    }

    func testQuestionsBecomeTheSamePrompts() throws {
        let (tokenizer, vectors) = (try self.tokenizer(), try self.vectors())
        for golden in vectors.cases {
            let prompt = try Prompt(
                [.question(golden.question, about: [golden.picture.image])],
                format: BundleConstants.promptFormat, tokenizer: tokenizer)
            XCTAssertEqual(prompt.segments, golden.segments, golden.name)
            XCTAssertEqual(tokenizer.decode(golden.token_ids), golden.text, golden.name)
        }
    }
}
