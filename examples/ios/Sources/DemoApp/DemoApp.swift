#if canImport(SwiftUI) && canImport(PhotosUI)
    import FastVLM
    import FastVLMCore
    import Foundation
    import ImageIO
    import PhotosUI
    import SwiftUI

    @main
    struct DemoApp: App {
        var body: some Scene {
            WindowGroup { AskView() }
        }
    }

    /// Choose a picture, ask, and read the answer while it comes.
    struct AskView: View {
        @State private var assistant: Assistant?
        @State private var item: PhotosPickerItem?
        @State private var data: Data?
        @State private var question = "What is in this picture?"
        @State private var answer = "Loading the model ..."
        @State private var task: Task<Void, Never>?

        var body: some View {
            VStack(spacing: 16) {
                PhotosPicker("Choose a picture", selection: $item, matching: .images)
                ChosenPicture(data: data)
                TextField("Question", text: $question)
                    .textFieldStyle(.roundedBorder)
                HStack {
                    Button("Ask") { ask() }
                        .disabled(assistant == nil || data == nil)
                    Button("Stop") { stop() }
                        .disabled(task == nil)
                }
                ScrollView {
                    Text(answer).frame(maxWidth: .infinity, alignment: .leading)
                }
            }
            .padding()
            .task { await load() }
            .onChange(of: item) { Task { data = try? await item?.loadTransferable(type: Data.self) } }
        }

        /// From the app's resources, or from the folder that the command line names.
        private func load() async {
            do {
                let files: BundleFiles
                if CommandLine.arguments.count > 1 {
                    files = try await .compiled(folder: URL(fileURLWithPath: CommandLine.arguments[1]))
                } else {
                    files = try BundleFiles(resources: .main)
                }
                assistant = try await Assistant.open(files)
                answer = ""
            } catch {
                answer = "The model does not load: \(error)"
            }
        }

        private func stop() {
            task?.cancel()
            task = nil
        }

        private func ask() {
            guard let assistant, let data else { return }
            stop()
            answer = ""
            task = Task {
                do {
                    let picture = try RGBImage(data: data)
                    for try await piece in assistant.stream([.question(question, about: [picture])]) {
                        answer += piece
                    }
                } catch is CancellationError {
                } catch {
                    answer += "\n\(error)"
                }
                if !Task.isCancelled { task = nil }
            }
        }
    }

    /// A picture as it was chosen.
    struct ChosenPicture: View {
        let data: Data?

        var body: some View {
            if let data, let source = CGImageSourceCreateWithData(data as CFData, nil),
                let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
            {
                Image(decorative: image, scale: 1).resizable().scaledToFit().frame(maxHeight: 300)
            }
        }
    }
#else
    @main
    enum DemoApp {
        static func main() {
            print("the demo needs SwiftUI, which only Apple's systems have")
        }
    }
#endif
