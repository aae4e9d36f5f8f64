/// What is read of a `tokenizer.json`.
struct TokenizerFile: Decodable {
    struct AddedToken: Decodable {
        let id: Int
        let content: String
        let special: Bool
        let lstrip: Bool
        let rstrip: Bool
    }

    struct Step: Decodable {
        struct Pattern: Decodable {
            let regex: String?

            enum CodingKeys: String, CodingKey {
                case regex = "Regex"
            }
        }

        let type: String
        let pattern: Pattern?
        let pretokenizers: [Step]?
    }

    struct Model: Decodable {
        let type: String
        let vocab: [String: Int]
        let merges: [Merge]
    }

    /// Written as one text with a space, or as two texts.
    struct Merge: Decodable {
        let left: String
        let right: String

        init(from decoder: Decoder) throws {
            let container = try decoder.singleValueContainer()
            let parts: [String]
            if let text = try? container.decode(String.self) {
                parts = text.split(separator: " ", omittingEmptySubsequences: false).map(String.init)
            } else {
                parts = try container.decode([String].self)
            }
            guard parts.count == 2 else {
                throw TokenizerError.unsupported("a merge of \(parts.count) tokens")
            }
            (left, right) = (parts[0], parts[1])
        }
    }

    let addedTokens: [AddedToken]
    let normalizer: Step?
    let preTokenizer: Step?
    let model: Model

    enum CodingKeys: String, CodingKey {
        case addedTokens = "added_tokens"
        case normalizer
        case preTokenizer = "pre_tokenizer"
        case model
    }

    /// Sees that it asks for nothing but what `Tokenizer` does.
    func check() throws {
        let steps = preTokenizer?.pretokenizers ?? []
        guard model.type == "BPE", normalizer?.type == "NFC", steps.map(\.type) == ["Split", "ByteLevel"],
            steps[0].pattern?.regex == TextSplitter.pattern
        else {
            throw TokenizerError.unsupported("not Qwen2's tokenizer.json")
        }
        if let token = addedTokens.first(where: { $0.lstrip || $0.rstrip }) {
            throw TokenizerError.unsupported("added token \(token.content), which takes the space around it")
        }
    }
}

/// How `tokenizer.json` writes bytes: those that print as themselves, the others as letters from U+0100 on.
enum ByteAlphabet {
    static let bytes: [Unicode.Scalar: UInt8] = {
        var found: [Unicode.Scalar: UInt8] = [:]
        var next: UInt32 = 0x100
        for byte in UInt8.min...UInt8.max {
            switch byte {
            case 0x21...0x7E, 0xA1...0xAC, 0xAE...0xFF:
                found[Unicode.Scalar(byte)] = byte
            default:
                found[Unicode.Scalar(next)!] = byte
                next += 1
            }
        }
        return found
    }()
}
