/// SHA-256 in hexadecimal: CryptoKit is not everywhere.
func sha256(_ bytes: [UInt8]) -> String {
    let length = UInt64(bytes.count) * 8
    var message = bytes + [0x80]
    message += [UInt8](repeating: 0, count: (120 - message.count % 64) % 64)
    for shift in stride(from: 56, through: 0, by: -8) {
        message.append(UInt8(truncatingIfNeeded: length >> UInt64(shift)))
    }
    var hash = fractions(of: firstPrimes.prefix(8).map { Double($0).squareRoot() })
    let constants = fractions(of: firstPrimes.map(cubeRoot))
    for block in stride(from: 0, to: message.count, by: 64) {
        var words: [UInt32] = []
        for start in stride(from: block, to: block + 64, by: 4) {
            var word: UInt32 = 0
            for byte in message[start..<(start + 4)] { word = word << 8 | UInt32(byte) }
            words.append(word)
        }
        for index in 16..<64 {
            let (early, late) = (words[index - 15], words[index - 2])
            let first: UInt32 = turned(early, 7) ^ turned(early, 18) ^ (early >> 3)
            let second: UInt32 = turned(late, 17) ^ turned(late, 19) ^ (late >> 10)
            words.append(words[index - 16] &+ first &+ words[index - 7] &+ second)
        }
        var state = hash
        for index in 0..<64 {
            let (a, e) = (state[0], state[4])
            let choice: UInt32 = (e & state[5]) ^ (~e & state[6])
            let majority: UInt32 = (a & state[1]) ^ (a & state[2]) ^ (state[1] & state[2])
            let mixedE: UInt32 = turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)
            let mixedA: UInt32 = turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)
            let first: UInt32 = state[7] &+ mixedE &+ choice &+ constants[index] &+ words[index]
            state.removeLast()
            state.insert(first &+ mixedA &+ majority, at: 0)
            state[4] = state[4] &+ first
        }
        hash = zip(hash, state).map { $0 &+ $1 }
    }
    return hash.map { word in
        let digits = String(word, radix: 16)
        return String(repeating: "0", count: 8 - digits.count) + digits
    }.joined()
}

private func turned(_ word: UInt32, _ bits: UInt32) -> UInt32 {
    word >> bits | word << (32 - bits)
}

private let firstPrimes: [Int] = {
    var primes = [2]
    var number = 3
    while primes.count < 64 {
        if primes.allSatisfy({ number % $0 != 0 }) { primes.append(number) }
        number += 2
    }
    return primes
}()

private func fractions(of roots: [Double]) -> [UInt32] {
    roots.map { UInt32(($0 - $0.rounded(.down)) * 0x1p32) }
}

private func cubeRoot(_ prime: Int) -> Double {
    var root = Double(prime)
    for _ in 0..<60 { root -= (root * root * root - Double(prime)) / (3 * root * root) }
    return root
}
