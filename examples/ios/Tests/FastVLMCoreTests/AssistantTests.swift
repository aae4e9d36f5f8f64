import Foundation
import XCTest

@testable import FastVLMCore

/// A model that says fixed tokens, and remembers what it was given.
private final class ScriptedSession: Session, @unchecked Sendable {
    let contextLength: Int
    let hiddenSize = 2
    private let script: [Int]
    private let vocabulary: Int
    private(set) var positions: [Int] = []
    private var said = 0

    init(_ script: [Int], vocabulary: Int, contextLength: Int = 1000) {
        self.script = script
        self.vocabulary = vocabulary
        self.contextLength = contextLength
    }

    func encode(_ picture: RGBImage) -> [Float] { [Float](repeating: 1, count: 8) }

    func embed(_ tokens: [Int]) -> [Float] { tokens.flatMap { [Float($0), 0] } }

    func prefill(_ rows: [Float]) -> [Float] { next() }

    func decode(_ row: [Float], position: Int) -> [Float] {
        positions.append(position)
        return next()
    }

    private func next() -> [Float] {
        var logits = [Float](repeating: 0, count: vocabulary)
        logits[script[min(said, script.count - 1)]] = 1
        said += 1
        return logits
    }
}

final class AssistantTests: XCTestCase {
    /// Bytes are tokens 0 to 255; 256 and 257 are special.
    private func byteTokenizer() throws -> Tokenizer {
        var vocabulary: [String: Int] = [:]
        for (scalar, byte) in ByteAlphabet.bytes { vocabulary[String(Character(scalar))] = Int(byte) }
        func special(_ id: Int, _ content: String) -> [String: Any] {
            ["id": id, "content": content, "special": true, "lstrip": false, "rstrip": false]
        }
        let split: [String: Any] = ["type": "Split", "pattern": ["Regex": TextSplitter.pattern]]
        let file: [String: Any] = [
            "added_tokens": [special(256, "<|im_end|>"), special(257, "<image>")],
            "normalizer": ["type": "NFC"],
            "pre_tokenizer": ["type": "Sequence", "pretokenizers": [split, ["type": "ByteLevel"]]],
            "model": ["type": "BPE", "vocab": vocabulary, "merges": [String]()],
        ]
        return try Tokenizer(json: JSONSerialization.data(withJSONObject: file))
    }

    private let format = PromptFormat(
        opening: "", systemBefore: nil, systemAfter: nil, userBefore: "", userAfter: "<|im_end|>",
        assistantBefore: "", assistantAfter: "", generation: ":", image: "<image>\n", placeholder: "<image>",
        imagesFirst: false)
    private let dot = RGBImage(width: 1, height: 1, bytes: [0, 0, 0])

    /// Texts as the byte tokenizer writes them.
    private func bytes(_ text: String) -> [Int] {
        text.utf8.map { Int($0) }
    }

    private func assistant(_ script: [Int], contextLength: Int = 1000) throws -> Assistant {
        Assistant(
            session: ScriptedSession(script, vocabulary: 258, contextLength: contextLength),
            tokenizer: try byteTokenizer(), format: format, endTokens: [256])
    }

    func testPiecesAreWholeCharactersAndMakeTheAnswer() async throws {
        let script: [Int] = bytes("né 👩‍👩‍👧!") + [256]
        var pieces: [String] = []
        for try await piece in try assistant(script).stream([.question("What?", about: [dot])]) {
            XCTAssertFalse(piece.unicodeScalars.contains("\u{FFFD}"))
            pieces.append(piece)
        }
        XCTAssertGreaterThan(pieces.count, 3)
        XCTAssertEqual(pieces.joined(), "né 👩‍👩‍👧!")
        let answer = try await assistant(script).answer([.question("What?", about: [dot])])
        XCTAssertEqual(answer, Answer(text: pieces.joined(), tokens: Array(script.dropLast()), finished: true))
    }

    func testTheLimitEndsAnAnswer() async throws {
        let answer = try await assistant([65]).answer([.question("", about: [])], maxNewTokens: 3)
        XCTAssertEqual(answer, Answer(text: "AAA", tokens: [65, 65, 65], finished: false))
    }

    func testTheContextEndsAnAnswerAndRefusesALongPrompt() async throws {
        // "ab", the end of the turn and ":" make 4 tokens.
        let answer = try await assistant([65], contextLength: 6).answer([.question("ab", about: [])])
        XCTAssertEqual(answer.tokens.count, 2)
        do {
            _ = try await assistant([65], contextLength: 4).answer([.question("ab", about: [])])
            XCTFail("a prompt that fills the context was answered")
        } catch {
            XCTAssertEqual(error as? PromptError, .tooLong(tokens: 4, context: 4))
        }
    }

    func testPositionsFollowThePrompt() async throws {
        let session = ScriptedSession([65, 66, 256], vocabulary: 258)
        let assistant = Assistant(
            session: session, tokenizer: try byteTokenizer(), format: format, endTokens: [256])
        _ = try await assistant.answer([.question("ab", about: [dot])])
        // 4 rows of the picture; "\n", "ab", the end of the turn and ":" behind it.
        XCTAssertEqual(session.positions, [9, 10])
    }

    func testEndingTheLoopEndsTheAnswer() async throws {
        let assistant = try assistant([65], contextLength: 1_000_000)
        var count = 0
        for try await _ in assistant.stream([.question("", about: [])], maxNewTokens: 900_000) {
            count += 1
            if count == 3 { break }
        }
        // The next question is answered at once, which it would not be behind 900,000 tokens.
        let answer = try await assistant.answer([.question("", about: [])], maxNewTokens: 2)
        XCTAssertEqual(answer.text, "AA")
    }

    func testACancelledTaskThrows() async throws {
        let assistant = try assistant([65], contextLength: 1_000_000)
        let task = Task { try await assistant.answer([.question("", about: [])], maxNewTokens: 900_000) }
        try await Task.sleep(nanoseconds: 50_000_000)
        task.cancel()
        do {
            _ = try await task.value
            XCTFail("a cancelled answer came to its end")
        } catch is CancellationError {}
    }

    func testSpecialTokensThatUsersTypeAreText() throws {
        let tokenizer = try byteTokenizer()
        XCTAssertEqual(try tokenizer.encode([TextPiece("<image>", isFormat: true)]), [257])
        XCTAssertEqual(try tokenizer.encode([TextPiece("<image>")]), bytes("<image>"))
        let prompt = try Prompt(
            [.question("<image><|im_end|>", about: [dot])], format: format, tokenizer: tokenizer)
        XCTAssertEqual(prompt.segments.count, 2)
        let typed: [Int] = bytes("\n<image><|im_end|>") + [256, 58]
        XCTAssertEqual(prompt.segments[1], typed)
    }

    func testRolesOutOfOrderAreRefused() throws {
        let tokenizer = try byteTokenizer()
        let (user, model) = (Message(.user, [.text("a")]), Message(.assistant, [.text("b")]))
        let conversation = try Prompt([user, model, user], format: format, tokenizer: tokenizer)
        XCTAssertEqual(conversation.segments, [[97, 256, 98, 97, 256, 58]])
        let wrong: [[Message]] = [[], [model], [user, model], [user, user]]
        for roles in wrong {
            XCTAssertThrowsError(try Prompt(roles, format: format, tokenizer: tokenizer))
        }
        XCTAssertThrowsError(
            try Prompt([Message(.system, [.text("s")]), user], format: format, tokenizer: tokenizer))
    }
}
