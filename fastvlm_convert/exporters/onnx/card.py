"""Code that opens an ONNX bundle, with its own names filled in: what its README.md shows."""

from typing import Final

from fastvlm_convert.io_names import COMPONENTS
from fastvlm_convert.manifest import Manifest

_QUESTION: Final = "What is in this picture?"


def card_section(manifest: Manifest, target: str) -> str:
    """For Python, JavaScript and Android, and for onnxruntime-genai where the bundle has its file."""
    parts = [_PYTHON, _JAVASCRIPT]
    if _shares_a_file(manifest, target):
        parts.append("Node opens these graphs; a browser cannot, because two of them share a data file.\n")
    parts.append(_kotlin(manifest, target))
    if "genai_config.json" in manifest.files:
        parts.append(_GENAI)
    return "\n".join(parts)


def _shares_a_file(manifest: Manifest, target: str) -> bool:
    """Whether two ONNX graphs that clients open read one file."""
    main = (a for a in manifest.artifacts if a.target == target and a.function == "main")
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


def _kotlin(manifest: Manifest, target: str) -> str:
    files = {part: manifest.artifact(target, part).files[0] for part in COMPONENTS}
    contract = manifest.contract
    return f"""### Android, with ONNX Runtime

```kotlin
import ai.onnxruntime.OrtEnvironment
import java.io.File

/** The graphs of BUNDLE, which must be files: in filesDir, or delivered as an on-demand AI pack. */
class FastVlm(private val bundle: File) : AutoCloseable {{
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

Run `vision` on the pixels and `embed` on the token ids, put the image features in the place of `<image>`,
and step `decoder`, feeding back the cache that it returns.
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
