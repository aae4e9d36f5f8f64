"""Code that opens a Core ML bundle, with its own names filled in: what its README.md shows."""

from pathlib import PurePosixPath

from fastvlm_convert.manifest import Manifest


def card_section(manifest: Manifest, target: str) -> str:
    """In Swift."""
    artifacts = [a for a in manifest.artifacts if a.target == target]
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
