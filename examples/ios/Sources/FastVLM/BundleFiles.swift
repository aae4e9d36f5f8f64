#if canImport(CoreML)
    import CoreML
    import FastVLMCore
    import Foundation

    /// Where the compiled packages and the tokenizer of a bundle are, whose constants were compiled in.
    public struct BundleFiles: Sendable {
        public let vision: URL
        public let decoder: URL
        public let tokenizer: URL

        public init(vision: URL, decoder: URL, tokenizer: URL) {
            self.vision = vision
            self.decoder = decoder
            self.tokenizer = tokenizer
        }

        /// What Xcode put into an app: `vision.mlmodelc`, `decoder.mlmodelc` and `tokenizer.json`.
        public init(resources: Foundation.Bundle) throws {
            func find(_ name: String, _ type: String) throws -> URL {
                guard let url = resources.url(forResource: name, withExtension: type) else {
                    throw SessionError.unsupported("the app has no \(name).\(type)")
                }
                return url
            }
            vision = try find("vision", "mlmodelc")
            decoder = try find("decoder", "mlmodelc")
            tokenizer = try find("tokenizer", "json")
        }

        /// Of the folder that `fastvlm-convert export` made; its packages are compiled, which takes a while.
        public static func compiled(folder: URL) async throws -> BundleFiles {
            let vision = folder.appendingPathComponent(BundleConstants.vision.path)
            let decoder = folder.appendingPathComponent(BundleConstants.decoder.path)
            return BundleFiles(
                vision: try await MLModel.compileModel(at: vision),
                decoder: try await MLModel.compileModel(at: decoder),
                tokenizer: folder.appendingPathComponent("tokenizer.json"))
        }
    }

    extension Assistant {
        /// Loads a bundle, not on the caller's actor: that may take seconds.
        public static func open(
            _ files: BundleFiles, computeUnits: MLComputeUnits = .cpuAndGPU
        ) async throws -> Assistant {
            let session = try CoreMLSession(
                vision: files.vision, decoder: files.decoder, computeUnits: computeUnits)
            return Assistant(
                session: session,
                tokenizer: try Tokenizer(json: Data(contentsOf: files.tokenizer)),
                format: BundleConstants.promptFormat,
                endTokens: Set(BundleConstants.eosTokenIds))
        }
    }
#endif
