// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "FastVLM",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "FastVLM", targets: ["FastVLM"]),
        .executable(name: "fastvlm-ask", targets: ["fastvlm-ask"]),
    ],
    targets: [
        // Tokenizer, prompt, pictures and the decode loop: no framework of Apple's but Foundation.
        .target(name: "FastVLMCore"),
        // Core ML and CoreGraphics; empty where they are missing.
        .target(name: "FastVLM", dependencies: ["FastVLMCore"]),
        .executableTarget(name: "fastvlm-ask", dependencies: ["FastVLM"]),
        .executableTarget(name: "DemoApp", dependencies: ["FastVLM"]),
        .target(name: "GoldenVectors", dependencies: ["FastVLMCore"], path: "Tests/GoldenVectors"),
        .testTarget(name: "FastVLMCoreTests", dependencies: ["FastVLMCore", "GoldenVectors"]),
        .testTarget(name: "FastVLMTests", dependencies: ["FastVLM", "GoldenVectors"]),
    ]
)
