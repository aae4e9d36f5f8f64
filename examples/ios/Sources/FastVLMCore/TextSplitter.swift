/// Qwen2's split of text into words, before byte-pair encoding works within each.
///
/// Written out by hand, because regular expressions of other platforms read some of its classes differently.
enum TextSplitter {
    /// The pattern in `tokenizer.json` that this is.
    static let pattern =
        #"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"#
        + #"|\s*[\r\n]+|\s+(?!\S)|\s+"#

    /// The words of a text; side by side they are the text.
    static func words(of text: String) -> [String] {
        let scalars = Array(text.unicodeScalars)
        var words: [String] = []
        var start = 0
        while start < scalars.count {
            let end = endOfWord(scalars, start)
            var word = String.UnicodeScalarView()
            word.append(contentsOf: scalars[start..<end])
            words.append(String(word))
            start = end
        }
        return words
    }

    private static let contractions = ["s", "t", "re", "ve", "m", "ll", "d"].map { Array($0.unicodeScalars) }

    private static func endOfWord(_ text: [Unicode.Scalar], _ start: Int) -> Int {
        endOfContraction(text, start) ?? endOfLetters(text, start) ?? endOfNumber(text, start)
            ?? endOfSymbols(text, start) ?? endOfSpace(text, start)
    }

    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)`
    private static func endOfContraction(_ text: [Unicode.Scalar], _ start: Int) -> Int? {
        guard text[start] == "'" else { return nil }
        for letters in contractions {
            let end = start + 1 + letters.count
            if end <= text.count, zip(text[(start + 1)..<end], letters).allSatisfy({ lower($0) == $1 }) {
                return end
            }
        }
        return nil
    }

    /// `[^\r\n\p{L}\p{N}]?\p{L}+`
    private static func endOfLetters(_ text: [Unicode.Scalar], _ start: Int) -> Int? {
        let first = text[start]
        let leads = !isLineBreak(first) && !isLetter(first) && !isNumber(first)
        return run(text, from: leads ? start + 1 : start, where: isLetter)
    }

    /// `\p{N}`
    private static func endOfNumber(_ text: [Unicode.Scalar], _ start: Int) -> Int? {
        isNumber(text[start]) ? start + 1 : nil
    }

    /// ` ?[^\s\p{L}\p{N}]+[\r\n]*`
    private static func endOfSymbols(_ text: [Unicode.Scalar], _ start: Int) -> Int? {
        guard let end = run(text, from: text[start] == " " ? start + 1 : start, where: isSymbol) else {
            return nil
        }
        return run(text, from: end, where: isLineBreak) ?? end
    }

    /// `\s*[\r\n]+|\s+(?!\S)|\s+`
    private static func endOfSpace(_ text: [Unicode.Scalar], _ start: Int) -> Int {
        let end = run(text, from: start, where: { $0.properties.isWhitespace }) ?? start + 1
        if let lastBreak = text[start..<end].lastIndex(where: isLineBreak) {
            return lastBreak + 1
        }
        // The last space before a word belongs to the word.
        return end == text.count || end == start + 1 ? end : end - 1
    }

    /// Where a run of at least one ends.
    private static func run(
        _ text: [Unicode.Scalar], from start: Int, where belongs: (Unicode.Scalar) -> Bool
    ) -> Int? {
        var end = start
        while end < text.count, belongs(text[end]) { end += 1 }
        return end > start ? end : nil
    }

    private static func lower(_ scalar: Unicode.Scalar) -> Unicode.Scalar {
        if scalar == "\u{17F}" { return "s" }  // the long s
        return ("A"..."Z").contains(scalar) ? Unicode.Scalar(scalar.value + 32)! : scalar
    }

    private static func isLineBreak(_ scalar: Unicode.Scalar) -> Bool {
        scalar == "\r" || scalar == "\n"
    }

    private static func isLetter(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.properties.generalCategory {
        case .uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter: true
        default: false
        }
    }

    private static func isNumber(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.properties.generalCategory {
        case .decimalNumber, .letterNumber, .otherNumber: true
        default: false
        }
    }

    private static func isSymbol(_ scalar: Unicode.Scalar) -> Bool {
        !scalar.properties.isWhitespace && !isLetter(scalar) && !isNumber(scalar)
    }
}
