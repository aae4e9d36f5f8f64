/// The texts around the turns of a conversation.
public struct PromptFormat: Equatable, Sendable {
    public var opening: String
    public var systemBefore: String?
    public var systemAfter: String?
    public var userBefore: String
    public var userAfter: String
    public var assistantBefore: String
    public var assistantAfter: String
    public var generation: String
    /// What a picture becomes: the placeholder, and what follows it.
    public var image: String
    public var placeholder: String
    public var imagesFirst: Bool

    public init(
        opening: String, systemBefore: String?, systemAfter: String?, userBefore: String, userAfter: String,
        assistantBefore: String, assistantAfter: String, generation: String, image: String,
        placeholder: String, imagesFirst: Bool
    ) {
        self.opening = opening
        self.systemBefore = systemBefore
        self.systemAfter = systemAfter
        self.userBefore = userBefore
        self.userAfter = userAfter
        self.assistantBefore = assistantBefore
        self.assistantAfter = assistantAfter
        self.generation = generation
        self.image = image
        self.placeholder = placeholder
        self.imagesFirst = imagesFirst
    }
}

/// A part of a message.
public enum Content: Equatable, Sendable {
    /// Text is only ever text: `<image>` or `<|im_end|>` in it is no placeholder and no token.
    case text(String)
    case picture(RGBImage)
}

/// One turn of a conversation.
public struct Message: Equatable, Sendable {
    public enum Role: Sendable {
        case system, user, assistant
    }

    public let role: Role
    public let content: [Content]

    public init(_ role: Role, _ content: [Content]) {
        self.role = role
        self.content = content
    }

    /// A question about pictures, which come first.
    public static func question(_ text: String, about pictures: [RGBImage]) -> Message {
        Message(.user, pictures.map(Content.picture) + [.text(text)])
    }
}

/// A conversation that cannot be answered.
public enum PromptError: Error, Equatable {
    /// It must begin with system or user, alternate user and assistant, and end with user.
    case roles
    /// The model's format has no system turn.
    case noSystemTurn
    /// A prompt and at least one token of an answer do not fit into the context.
    case tooLong(tokens: Int, context: Int)
}

/// A prompt ready for a model: a picture stands between two consecutive segments.
public struct Prompt: Equatable, Sendable {
    public let segments: [[Int]]
    public let pictures: [RGBImage]

    /// Puts a conversation into the format that the model was trained on.
    public init(_ messages: [Message], format: PromptFormat, tokenizer: Tokenizer) throws {
        var writer = PromptWriter(format: format)
        try writer.write(messages)
        segments = try writer.segments.map(tokenizer.encode)
        pictures = writer.pictures
    }
}

private struct PromptWriter {
    let format: PromptFormat
    var segments: [[TextPiece]] = [[]]
    var pictures: [RGBImage] = []

    mutating func write(_ messages: [Message]) throws {
        var turns = messages[...]
        if let first = turns.first, first.role == .system {
            guard let before = format.systemBefore, let after = format.systemAfter else {
                throw PromptError.noSystemTurn
            }
            turn(before, first.content, after)
            turns.removeFirst()
        } else {
            add(format.opening)
        }
        guard turns.count % 2 == 1 else { throw PromptError.roles }
        for (number, message) in turns.enumerated() {
            let isUser = number % 2 == 0
            guard message.role == (isUser ? .user : .assistant) else { throw PromptError.roles }
            if isUser {
                turn(format.userBefore, message.content, format.userAfter)
            } else {
                turn(format.assistantBefore, message.content, format.assistantAfter)
            }
        }
        add(format.generation)
    }

    private mutating func turn(_ before: String, _ content: [Content], _ after: String) {
        add(before)
        var parts = content
        if format.imagesFirst {
            parts = content.filter(\.isPicture) + content.filter { !$0.isPicture }
        }
        for part in parts {
            switch part {
            case .text(let text): segments[segments.count - 1].append(TextPiece(text))
            case .picture(let picture): add(picture)
            }
        }
        add(after)
    }

    private mutating func add(_ text: String) {
        segments[segments.count - 1].append(TextPiece(text, isFormat: true))
    }

    private mutating func add(_ picture: RGBImage) {
        let parts = format.image.components(around: format.placeholder)
        add(parts.before)
        pictures.append(picture)
        segments.append([])
        add(parts.after)
    }
}

extension Content {
    fileprivate var isPicture: Bool {
        if case .picture = self { return true }
        return false
    }
}

extension String {
    /// What stands before and behind the first place of a text; all of it before, where the text is not there.
    fileprivate func components(around part: String) -> (before: String, after: String) {
        let (whole, sought) = (Array(utf8), Array(part.utf8))
        guard !sought.isEmpty, whole.count >= sought.count,
            let start = (0...(whole.count - sought.count)).first(where: { whole[$0...].starts(with: sought) })
        else { return (self, "") }
        return (
            String(decoding: whole[..<start], as: UTF8.self),
            String(decoding: whole[(start + sought.count)...], as: UTF8.self)
        )
    }
}
