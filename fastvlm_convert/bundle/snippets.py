"""Code for every platform, with the names of the very bundle filled in: what its README.md shows."""

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Final

from fastvlm_convert.io_names import COMPONENTS
from fastvlm_convert.manifest import Manifest

_QUESTION: Final = "What is in this picture?"


def _onnx(manifest: Manifest) -> str:
    parts = [_PYTHON, _JAVASCRIPT]
    if _shares_a_file(manifest):
        parts.append("Node opens these graphs; a browser cannot, because two of them share a data file.\n")
    parts.append(_kotlin(manifest))
    if "genai_config.json" in manifest.files:
        parts.append(_GENAI)
    return "\n".join(parts)


def _shares_a_file(manifest: Manifest) -> bool:
    """Whether two ONNX graphs that clients open read one file."""
    main = (a for a in manifest.artifacts if a.target == "onnx" and a.function == "main")
    files = [file for artifact in main for file in artifact.files]
    return len(set(files)) < len(files)


_PYTHON: Final = f"""### Python

```sh
fastvlm-convert run BUNDLE photo.jpg "{_QUESTION}"
```

```python
import fastvlm_convert

model = fastvlm_convert.load_bundle("BUNDLE")
for piece in model.ask("photo.jpg", "{_QUESTION}"):
    print(piece, end="", flush=True)
```
"""
_JAVASCRIPT: Final = f"""### JavaScript, with transformers.js

```js
import {{ AutoModelForImageTextToText, AutoProcessor, RawImage, env }} from "@huggingface/transformers";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./"; // the folder, or the URL, in which BUNDLE lies

const processor = await AutoProcessor.from_pretrained("BUNDLE");
const model = await AutoModelForImageTextToText.from_pretrained("BUNDLE", {{ dtype: "auto" }});
const messages = [{{ role: "user", content: "<image>\\n{_QUESTION}" }}];
const prompt = processor.apply_chat_template(messages, {{ add_generation_prompt: true }});
const inputs = await processor(await RawImage.read("photo.jpg"), prompt, {{ add_special_tokens: false }});
const output = await model.generate({{ ...inputs, max_new_tokens: 128 }});
const answer = output.slice(null, [inputs.input_ids.dims[1], null]);
console.log(processor.batch_decode(answer, {{ skip_special_tokens: true }})[0]);
```
"""


def _kotlin(manifest: Manifest) -> str:
    files = {part: manifest.artifact("onnx", part).files[0] for part in COMPONENTS}
    contract = manifest.contract
    return f"""### Android, with ONNX Runtime

```kotlin
import ai.onnxruntime.OrtEnvironment
import java.io.File

/** The graphs of BUNDLE, which must be files: in filesDir, or delivered as an on-demand AI pack. */
class FastVlm(bundle: File) : AutoCloseable {{
    private val environment = OrtEnvironment.getEnvironment()
    private fun open(name: String) = environment.createSession(File(bundle, name).path)

    val vision = open("{files["vision"]}")
    val embed = open("{files["embed"]}")
    val decoder = open("{files["decoder"]}")
    val imageSize = {contract.image_size}
    val imageTokens = {contract.num_image_tokens}
    val imageTokenId = {contract.image_token_id}L
    val eosTokenIds = setOf({", ".join(f"{token}L" for token in contract.eos_token_ids)})

    override fun close() = listOf(vision, embed, decoder).forEach {{ it.close() }}
}}
```

Run `vision` on the pixels and `embed` on the token ids, put the image features in the place of `<image>`, and step
`decoder`, feeding back the cache that it returns.
"""


_GENAI: Final = """### Python, with onnxruntime-genai

```python
import onnxruntime_genai as og

model = og.Model("BUNDLE")
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=256)
generator = og.Generator(model, parameters)
prompt = "<|im_start|>user\\nWhat is a FastVLM?<|im_end|>\\n<|im_start|>assistant\\n"
generator.append_tokens(tokenizer.encode(prompt))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```

Pictures go in with `Generator.set_inputs`: `input_ids`, `pixel_values` and `num_image_tokens`.
"""


def _coreml(manifest: Manifest) -> str:
    artifacts = [a for a in manifest.artifacts if a.target == "coreml"]
    names = {a.component: PurePosixPath(a.files[0]).parent for a in artifacts}
    vision, decoder = names["vision"], names["decoder"]
    loads = "\n".join(
        f'let {a.function} = try model("{decoder.stem}", function: "{a.function}")'
        for a in artifacts
        if names[a.component] == decoder
    )
    contract = manifest.contract
    return f"""### iOS and macOS, with Core ML

Add `{vision}` and `{decoder}` to an Xcode target (iOS 18 or macOS 15).

```swift
import CoreML

func model(_ name: String, function: String? = nil) throws -> MLModel {{
    let configuration = MLModelConfiguration()
    configuration.computeUnits = .cpuAndGPU
    configuration.functionName = function
    let url = Bundle.main.url(forResource: name, withExtension: "mlmodelc")!
    return try MLModel(contentsOf: url, configuration: configuration)
}}

let vision = try model("{vision.stem}")
{loads}
let imageSize = {contract.image_size}, imageTokens = {contract.num_image_tokens}
let eosTokenIds: Set<Int> = [{", ".join(map(str, contract.eos_token_ids))}]
```

Run `vision` on the picture and embed the token ids, put the image features in the place of `<image>`, prefill
with a state of `makeState()`, and decode with the same state.
"""


def _mlx(manifest: Manifest) -> str:
    folder = PurePosixPath(manifest.artifact("mlx", "decoder").files[0]).parent
    return f"""### Macs, with mlx-vlm

```sh
pip install mlx-vlm
python -m mlx_vlm.generate --model BUNDLE/{folder} --image photo.jpg --prompt "{_QUESTION}"
```
"""


# By target; a target without one is listed with its files alone.
SECTIONS: Final[Mapping[str, Callable[[Manifest], str]]] = {"onnx": _onnx, "coreml": _coreml, "mlx": _mlx}
