#if canImport(CoreML)
    import CoreML
    import FastVLMCore
    import Foundation

    /// Opens a bundle whose constants were compiled in.
    public enum FastVLM {
        /// What Xcode put into an app: `vision.mlmodelc`, `decoder.mlmodelc` and `tokenizer.json`.
        public static func assistant(
            resources: Foundation.Bundle, computeUnits: MLComputeUnits = .cpuAndGPU
        ) throws -> Assistant {
            func find(_ name: String, _ type: String) throws -> URL {
                guard let url = resources.url(forResource: name, withExtension: type) else {
                    throw SessionError.unsupported("the app has no \(name).\(type)")
                }
                return url
            }
            return try assistant(
                vision: find("vision", "mlmodelc"), decoder: find("decoder", "mlmodelc"),
                tokenizer: find("tokenizer", "json"), computeUnits: computeUnits)
        }

        /// The folder that `fastvlm-convert export` made; its packages are compiled first, which takes a while.
        public static func assistant(
            folder: URL, computeUnits: MLComputeUnits = .cpuAndGPU
        ) async throws -> Assistant {
            let vision = folder.appendingPathComponent(BundleConstants.vision.path)
            let decoder = folder.appendingPathComponent(BundleConstants.decoder.path)
            return try assistant(
                vision: await MLModel.compileModel(at: vision), decoder: await MLModel.compileModel(at: decoder),
                tokenizer: folder.appendingPathComponent("tokenizer.json"), computeUnits: computeUnits)
        }

        /// Compiled packages and a tokenizer, wherever they are.
        public static func assistant(
            vision: URL, decoder: URL, tokenizer: URL, computeUnits: MLComputeUnits = .cpuAndGPU
        ) throws -> Assistant {
            Assistant(
                session: try CoreMLSession(vision: vision, decoder: decoder, computeUnits: computeUnits),
                tokenizer: try Tokenizer(json: Data(contentsOf: tokenizer)),
                format: BundleConstants.promptFormat,
                endTokens: Set(BundleConstants.eosTokenIds))
        }
    }
#endif
