import FastVLM
import FastVLMCore
import Foundation

let arguments = CommandLine.arguments
guard arguments.count == 4 else {
    FileHandle.standardError.write(Data("usage: fastvlm-ask BUNDLE PICTURE QUESTION\n".utf8))
    exit(2)
}
#if canImport(CoreML)
    let picture = try RGBImage(contentsOf: URL(fileURLWithPath: arguments[2]))
    let files = try await BundleFiles.compiled(folder: URL(fileURLWithPath: arguments[1]))
    let assistant = try await Assistant.open(files)
    for try await piece in assistant.stream([.question(arguments[3], about: [picture])]) {
        FileHandle.standardOutput.write(Data(piece.utf8))
    }
    FileHandle.standardOutput.write(Data("\n".utf8))
#else
    FileHandle.standardError.write(Data("Core ML is needed, which only Apple's systems have\n".utf8))
    exit(2)
#endif
