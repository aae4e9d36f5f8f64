#if canImport(CoreML)
    import CoreML
    import CoreVideo
    import FastVLMCore
    import Foundation

    /// A bundle that cannot be run.
    public enum SessionError: Error {
        /// The constants are of a bundle that this code does not run.
        case unsupported(String)
        /// A model gave no such output.
        case noOutput(String)
        case noPixelBuffer
    }

    /// The functions of a bundle's packages, and the state that two of them share.
    public final class CoreMLSession: Session {
        public let contextLength = BundleConstants.contextLength
        public let hiddenSize = BundleConstants.hiddenSize

        private let vision: MLModel
        private let embedder: MLModel
        private let decoder: MLModel
        private let prefiller: MLModel
        private let prefillGraph: BundleConstants.Graph
        private var state: MLState

        /// - Parameters:
        ///   - vision: The compiled vision package (`.mlmodelc`).
        ///   - decoder: The compiled decoder package.
        ///   - computeUnits: Where Core ML may run them.
        public init(vision: URL, decoder: URL, computeUnits: MLComputeUnits = .cpuAndGPU) throws {
            guard BundleConstants.target == "coreml", BundleConstants.cacheIsState else {
                throw SessionError.unsupported("a Core ML bundle with coreml.kv_cache: state is needed")
            }
            func load(_ url: URL, function: String?) throws -> MLModel {
                let configuration = MLModelConfiguration()
                configuration.computeUnits = computeUnits
                configuration.functionName = function
                return try MLModel(contentsOf: url, configuration: configuration)
            }
            self.vision = try load(vision, function: nil)
            embedder = try load(decoder, function: BundleConstants.embed.function)
            let steps = try load(decoder, function: BundleConstants.decoder.function)
            self.decoder = steps
            let first: MLModel
            if let prefill = BundleConstants.prefill {
                first = try load(decoder, function: prefill.function)
                prefillGraph = prefill
            } else {
                first = steps
                prefillGraph = BundleConstants.decoder
            }
            prefiller = first
            state = first.makeState()
        }

        public func encode(_ picture: RGBImage) throws -> [Float] {
            let (settings, input) = (BundleConstants.imageSettings, BundleConstants.vision.inputs[0])
            let value: MLFeatureValue
            if input.dtype == "rgb_image" {
                value = MLFeatureValue(pixelBuffer: try Self.pixelBuffer(settings.square(picture)))
            } else {
                let pixels = try settings.pixelValues(picture)
                value = MLFeatureValue(multiArray: try Self.array(pixels, input.shape, input.dtype))
            }
            let given = try MLDictionaryFeatureProvider(dictionary: [input.name: value])
            return try Self.output("image_features", of: vision.prediction(from: given))
        }

        public func embed(_ tokens: [Int]) throws -> [Float] {
            var rows: [Float] = []
            for start in stride(from: 0, to: tokens.count, by: BundleConstants.prefillChunk) {
                let part = tokens[start..<min(start + BundleConstants.prefillChunk, tokens.count)]
                let ids = try Self.numbers(Array(part), shape: [1, part.count])
                let given = try MLDictionaryFeatureProvider(
                    dictionary: ["input_ids": MLFeatureValue(multiArray: ids)])
                rows += try Self.output("inputs_embeds", of: embedder.prediction(from: given))
            }
            return rows
        }

        public func prefill(_ rows: [Float]) throws -> [Float] {
            state = prefiller.makeState()
            let chunk = BundleConstants.prefillChunk
            let count = rows.count / hiddenSize
            var logits: [Float] = []
            for start in stride(from: 0, to: count, by: chunk) {
                try Task.checkCancellation()
                let length = min(chunk, count - start)
                var part = Array(rows[(start * hiddenSize)..<((start + length) * hiddenSize)])
                if BundleConstants.padsChunks {
                    part += [Float](repeating: 0, count: (chunk - length) * hiddenSize)
                }
                logits = try append(part, position: start, last: length - 1, prefiller, prefillGraph)
            }
            return logits
        }

        public func decode(_ row: [Float], position: Int) throws -> [Float] {
            try append(row, position: position, last: 0, decoder, BundleConstants.decoder)
        }

        private func append(
            _ rows: [Float], position: Int, last: Int, _ model: MLModel, _ graph: BundleConstants.Graph
        ) throws -> [Float] {
            var given: [String: MLFeatureValue] = [:]
            for input in graph.inputs {
                switch input.name {
                case "inputs_embeds":
                    let shape = [1, rows.count / hiddenSize, hiddenSize]
                    given[input.name] = MLFeatureValue(multiArray: try Self.array(rows, shape, input.dtype))
                case "position":
                    given[input.name] = MLFeatureValue(multiArray: try Self.numbers([position], shape: [1]))
                case "last_index":
                    given[input.name] = MLFeatureValue(multiArray: try Self.numbers([last], shape: [1]))
                default:
                    break  // the states
                }
            }
            let provider = try MLDictionaryFeatureProvider(dictionary: given)
            return try Self.output("logits", of: model.prediction(from: provider, using: state))
        }

        /// An output as floats in their order.
        private static func output(_ name: String, of outputs: any MLFeatureProvider) throws -> [Float] {
            guard let array = outputs.featureValue(for: name)?.multiArrayValue else {
                throw SessionError.noOutput(name)
            }
            return try floats(of: array)
        }

        static func floats(of array: MLMultiArray) throws -> [Float] {
            let (shape, strides) = (array.shape.map(\.intValue), array.strides.map(\.intValue))
            let isHalf = array.dataType == .float16
            guard isHalf || array.dataType == .float32 else {
                throw SessionError.unsupported("an output of type \(array.dataType.rawValue)")
            }
            let length = shape.last ?? 1
            let step = strides.last ?? 1
            var values: [Float] = []
            values.reserveCapacity(array.count)
            array.withUnsafeBytes { bytes in
                guard let base = bytes.baseAddress else { return }
                // Rows may lie further apart than they are long.
                for row in 0..<(array.count / max(1, length)) {
                    var (rest, start) = (row, 0)
                    for axis in (0..<(shape.count - 1)).reversed() {
                        start += rest % shape[axis] * strides[axis]
                        rest /= shape[axis]
                    }
                    for index in 0..<length {
                        let place = start + index * step
                        values.append(
                            isHalf
                                ? Half.float(base.load(fromByteOffset: 2 * place, as: UInt16.self))
                                : base.load(fromByteOffset: 4 * place, as: Float.self))
                    }
                }
            }
            return values
        }

        static func array(_ values: [Float], _ shape: [Int], _ dtype: String) throws -> MLMultiArray {
            let isHalf = dtype == "float16"
            let array = try MLMultiArray(
                shape: shape.map { NSNumber(value: $0) }, dataType: isHalf ? .float16 : .float32)
            array.withUnsafeMutableBytes { bytes, _ in
                if isHalf {
                    bytes.copyBytes(from: values.map(Half.bits).withUnsafeBytes { Array($0) })
                } else {
                    values.withUnsafeBytes { bytes.copyMemory(from: $0) }
                }
            }
            return array
        }

        private static func numbers(_ values: [Int], shape: [Int]) throws -> MLMultiArray {
            let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .int32)
            array.withUnsafeMutableBytes { bytes, _ in
                values.map(Int32.init).withUnsafeBytes { bytes.copyMemory(from: $0) }
            }
            return array
        }

        /// A picture of the encoder's size, pixel for pixel: Core ML neither scales nor converts it.
        private static func pixelBuffer(_ picture: RGBImage) throws -> CVPixelBuffer {
            var created: CVPixelBuffer?
            CVPixelBufferCreate(
                kCFAllocatorDefault, picture.width, picture.height, kCVPixelFormatType_32BGRA, nil, &created)
            guard let buffer = created, CVPixelBufferLockBaseAddress(buffer, []) == kCVReturnSuccess,
                let base = CVPixelBufferGetBaseAddress(buffer)
            else { throw SessionError.noPixelBuffer }
            defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
            let rowBytes = CVPixelBufferGetBytesPerRow(buffer)
            for y in 0..<picture.height {
                let row = base.advanced(by: y * rowBytes).assumingMemoryBound(to: UInt8.self)
                for x in 0..<picture.width {
                    let source = 3 * (y * picture.width + x)
                    row[4 * x] = picture.bytes[source + 2]
                    row[4 * x + 1] = picture.bytes[source + 1]
                    row[4 * x + 2] = picture.bytes[source]
                    row[4 * x + 3] = 255
                }
            }
            return buffer
        }
    }
#endif
