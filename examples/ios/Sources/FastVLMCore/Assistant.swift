import Foundation

/// A model that can be run, holding one cache of keys and values.
public protocol Session: AnyObject {
    /// Tokens that the cache holds, prompt and answer together.
    var contextLength: Int { get }
    /// A picture to rows of its image tokens, one behind the other.
    func encode(_ picture: RGBImage) throws -> [Float]
    /// Token ids to rows of the same width.
    func embed(_ tokens: [Int]) throws -> [Float]
    /// Starts a new sequence; the logits of its last row.
    func prefill(_ rows: [Float]) throws -> [Float]
    /// Appends one row; its logits.
    func decode(_ row: [Float], position: Int) throws -> [Float]
    /// Width of a row.
    var hiddenSize: Int { get }
}

/// What a model said.
public struct Answer: Equatable, Sendable {
    public let text: String
    /// Without the end token.
    public let tokens: [Int]
    /// Whether the model ended the answer, rather than the limit.
    public let finished: Bool
}

/// Answers questions about pictures. One answer at a time: the next question waits, or the task is cancelled.
public actor Assistant {
    private let session: any Session
    private let tokenizer: Tokenizer
    private let format: PromptFormat
    private let endTokens: Set<Int>

    public init(session: sending any Session, tokenizer: Tokenizer, format: PromptFormat, endTokens: Set<Int>) {
        self.session = session
        self.tokenizer = tokenizer
        self.format = format
        self.endTokens = endTokens
    }

    /// The pieces of an answer as they come. Ending the loop over them, or its task, ends the answer.
    public nonisolated func stream(
        _ messages: [Message], maxNewTokens: Int = 256
    ) -> AsyncThrowingStream<String, any Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    _ = try await self.answer(messages, maxNewTokens: maxNewTokens) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// A whole answer, decoded greedily.
    ///
    /// - Parameters:
    ///   - messages: The conversation; the last is the user's.
    ///   - maxNewTokens: Most tokens to answer with, the end token included; fewer where the context ends.
    ///   - onPiece: Called with each piece of text as it comes; half a character waits for its rest.
    /// - Throws: `CancellationError` as soon as the task is cancelled, between two tokens.
    public func answer(
        _ messages: [Message], maxNewTokens: Int = 256, onPiece: @Sendable (String) -> Void = { _ in }
    ) throws -> Answer {
        let prompt = try Prompt(messages, format: format, tokenizer: tokenizer)
        let rows = try embedded(prompt)
        let length = rows.count / session.hiddenSize
        guard length < session.contextLength else {
            throw PromptError.tooLong(tokens: length, context: session.contextLength)
        }
        let limit = min(maxNewTokens, session.contextLength - length)
        var logits = try session.prefill(rows)
        var (tokens, said) = ([Int](), "")
        for step in 0..<limit {
            try Task.checkCancellation()
            let token = Self.likeliest(logits)
            if endTokens.contains(token) {
                return finish(tokens, said, finished: true, onPiece)
            }
            tokens.append(token)
            let text = tokenizer.decode(tokens)
            if !text.unicodeScalars.ends(with: "\u{FFFD}") {
                said = Self.say(text, after: said, onPiece)
            }
            if step + 1 < limit {
                logits = try session.decode(session.embed([token]), position: length + step)
            }
        }
        return finish(tokens, said, finished: false, onPiece)
    }

    private func finish(
        _ tokens: [Int], _ said: String, finished: Bool, _ onPiece: (String) -> Void
    ) -> Answer {
        let text = Self.say(tokenizer.decode(tokens), after: said, onPiece)
        return Answer(text: text, tokens: tokens, finished: finished)
    }

    /// Hands on what is new in a text, and returns the text.
    private static func say(_ text: String, after said: String, _ onPiece: (String) -> Void) -> String {
        let new = text.unicodeScalars.dropFirst(said.unicodeScalars.count)
        if !new.isEmpty { onPiece(String(String.UnicodeScalarView(new))) }
        return text
    }

    private func embedded(_ prompt: Prompt) throws -> [Float] {
        var rows: [Float] = []
        for (number, segment) in prompt.segments.enumerated() {
            if number > 0 {
                try Task.checkCancellation()
                rows += try session.encode(prompt.pictures[number - 1])
            }
            if !segment.isEmpty { rows += try session.embed(segment) }
        }
        return rows
    }

    /// The first of the largest.
    static func likeliest(_ logits: [Float]) -> Int {
        var best = 0
        for (index, value) in logits.enumerated() where value > logits[best] { best = index }
        return best
    }
}

extension String.UnicodeScalarView {
    fileprivate func ends(with scalar: Unicode.Scalar) -> Bool {
        last == scalar
    }
}
