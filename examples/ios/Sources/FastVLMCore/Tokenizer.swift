import Foundation

/// A tokenizer that cannot be used, or a text that it cannot express.
public enum TokenizerError: Error, Equatable {
    /// `tokenizer.json` asks for something that this tokenizer does not do.
    case unsupported(String)
    /// The vocabulary has no token for a byte of this word.
    case notExpressible(String)
}

/// A piece of a prompt.
public struct TextPiece: Equatable, Sendable {
    public let content: String
    /// Whether the prompt's format wrote it: only then are special tokens in it tokens.
    public let isFormat: Bool

    public init(_ content: String, isFormat: Bool = false) {
        self.content = content
        self.isFormat = isFormat
    }
}

/// Byte-level byte-pair encoding as Qwen2 has it, read from the bundle's `tokenizer.json`.
public struct Tokenizer: Sendable {
    private struct Pair: Hashable {
        let left: Int
        let right: Int
    }

    private struct Merge {
        let rank: Int
        let token: Int
    }

    private let byteTokens: [Int?]
    private let merges: [Pair: Merge]
    private let bytes: [Int: [UInt8]]
    /// Tokens that only a format may write, and tokens that are found in any text, by what they look like.
    private let special: [String: Int]
    private let whole: [String: Int]

    /// - Parameter json: The content of `tokenizer.json`.
    public init(json: Data) throws {
        let file = try JSONDecoder().decode(TokenizerFile.self, from: json)
        try file.check()
        let byteOf = ByteAlphabet.bytes
        var bytes: [Int: [UInt8]] = [:]
        var idOf: [[UInt8]: Int] = [:]
        for (token, id) in file.model.vocab {
            // Tokens outside the alphabet are added ones, written as they are.
            let content = token.unicodeScalars.map { byteOf[$0] }
            let spelled = content.contains(nil) ? Array(token.utf8) : content.compactMap { $0 }
            bytes[id] = spelled
            idOf[spelled] = id
        }
        for added in file.addedTokens {
            bytes[added.id] = added.special ? [] : Array(added.content.utf8)
        }
        var merges: [Pair: Merge] = [:]
        for (rank, merge) in file.model.merges.enumerated() {
            let left = merge.left.unicodeScalars.compactMap { byteOf[$0] }
            let right = merge.right.unicodeScalars.compactMap { byteOf[$0] }
            guard let first = idOf[left], let second = idOf[right], let token = idOf[left + right] else {
                throw TokenizerError.unsupported("merge of \(merge.left) and \(merge.right)")
            }
            merges[Pair(left: first, right: second)] = Merge(rank: rank, token: token)
        }
        self.bytes = bytes
        self.merges = merges
        byteTokens = (0...255).map { idOf[[UInt8($0)]] }
        special = Dictionary(uniqueKeysWithValues: file.addedTokens.filter(\.special).map { ($0.content, $0.id) })
        whole = Dictionary(uniqueKeysWithValues: file.addedTokens.filter { !$0.special }.map { ($0.content, $0.id) })
    }

    /// Token ids of texts that stand side by side.
    public func encode(_ pieces: [TextPiece]) throws -> [Int] {
        var ids: [Int] = []
        var run = ""
        for piece in pieces {
            for part in Self.split(piece.content, at: piece.isFormat ? special : [:]) {
                switch part {
                case .text(let text):
                    run.unicodeScalars.append(contentsOf: text.unicodeScalars)
                case .token(let id):
                    ids += try encodeRun(run)
                    ids.append(id)
                    run = ""
                }
            }
        }
        return ids + (try encodeRun(run))
    }

    /// Text of ids; special tokens say nothing, and what is no whole character yet is U+FFFD.
    public func decode(_ ids: [Int]) -> String {
        String(decoding: ids.flatMap { bytes[$0] ?? [] }, as: UTF8.self)
    }

    private func encodeRun(_ run: String) throws -> [Int] {
        try Self.split(run, at: whole).flatMap { part in
            switch part {
            case .token(let id): return [id]
            case .text(let text):
                let words = TextSplitter.words(of: text.precomposedStringWithCanonicalMapping)
                return try words.flatMap(encodeWord)
            }
        }
    }

    /// The pair of the lowest rank is merged again and again, the leftmost first.
    private func encodeWord(_ word: String) throws -> [Int] {
        var tokens = try word.utf8.map { byte in
            guard let token = byteTokens[Int(byte)] else { throw TokenizerError.notExpressible(word) }
            return token
        }
        while tokens.count > 1 {
            var best: (index: Int, merge: Merge)?
            for index in 0..<(tokens.count - 1) {
                let pair = Pair(left: tokens[index], right: tokens[index + 1])
                if let merge = merges[pair], merge.rank < best?.merge.rank ?? Int.max {
                    best = (index, merge)
                }
            }
            guard let found = best else { break }
            tokens[found.index] = found.merge.token
            tokens.remove(at: found.index + 1)
        }
        return tokens
    }

    private enum Part {
        case text(String)
        case token(Int)
    }

    /// A text, cut where one of some tokens stands in it; the longest that begins at a place is taken.
    private static func split(_ text: String, at tokens: [String: Int]) -> [Part] {
        if tokens.isEmpty || text.isEmpty { return [.text(text)] }
        let ordered = tokens.map { (content: Array($0.key.utf8), id: $0.value) }
            .sorted { $0.content.count > $1.content.count }
        let source = Array(text.utf8)
        var parts: [Part] = []
        var start = 0
        var index = 0
        while index < source.count {
            if let token = ordered.first(where: { source[index...].starts(with: $0.content) }) {
                if start < index { parts.append(.text(String(decoding: source[start..<index], as: UTF8.self))) }
                parts.append(.token(token.id))
                index += token.content.count
                start = index
            } else {
                index += 1
            }
        }
        if start < source.count { parts.append(.text(String(decoding: source[start...], as: UTF8.self))) }
        return parts
    }
}
