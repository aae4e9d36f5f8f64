import FastVLMCore
import Foundation

/// What `fastvlm-convert bundle vectors` wrote; only what is compared.
public struct GoldenVectors: Decodable, Sendable {
    public struct Sampled: Decodable, Sendable {
        public let shape: [Int]
        public let indices: [Int]
        public let values: [Float]
        public let tolerance: Float
    }

    public struct Picture: Decodable, Sendable {
        let width: Int
        let height: Int
        let rgb_base64: Data

        public var image: RGBImage {
            RGBImage(width: width, height: height, bytes: [UInt8](rgb_base64))
        }
    }

    public struct Case: Decodable, Sendable {
        public let name: String
        public let picture: Picture
        public let question: String
        public let square_sha256: String
        public let pixel_values_sha256: String
        public let segments: [[Int]]
        public let image_features: Sampled
        public let first_logits: Sampled
        public let token_ids: [Int]
        public let margins: [Float]
        public let text: String
    }

    public struct Text: Decodable, Sendable {
        public let text: String
        public let token_ids: [Int]
        public let decoded: String
        public let segments: [[Int]]
    }

    public let manifest_sha256: String
    public let texts: [Text]
    public let cases: [Case]

    /// The bundle that the constants were generated from, where the environment says.
    public static var bundle: URL? {
        location("FASTVLM_BUNDLE")
    }

    /// The vectors of that bundle, where the environment says; other bundles' are refused.
    public static func load() throws -> GoldenVectors? {
        guard let file = location("FASTVLM_VECTORS") else { return nil }
        let found = try JSONDecoder().decode(GoldenVectors.self, from: Data(contentsOf: file))
        guard found.manifest_sha256 == BundleConstants.manifestSha256 else { throw OtherBundle() }
        return found
    }

    /// Vectors and constants are of two bundles.
    struct OtherBundle: Error {}

    private static func location(_ variable: String) -> URL? {
        ProcessInfo.processInfo.environment[variable].map { URL(fileURLWithPath: $0) }
    }
}
