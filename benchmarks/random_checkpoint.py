"""Write a checkpoint of Apple's exact format and dimensions with random weights.

    python -m benchmarks.random_checkpoint 0.5b FOLDER

For sizes, memory and speed only: a random network answers nonsense. Weights are streamed, so even 7B takes
little memory. The dimensions are those of apple/FastVLM-0.5B, -1.5B and -7B.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastvlm_convert.weights.model_config import DecoderConfig, ModelConfig
from fastvlm_convert.weights.published import DECODERS, FEATURES, published_config
from fastvlm_convert.weights.shapes import weight_shapes

NUM_TOKENS = 151_643  # Qwen2's vocabulary without its special tokens
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHUNK = 1 << 22


def apple_name(name: str) -> str:
    """The name under which Apple stores a weight."""
    vision = "model.vision_tower.vision_tower.model."
    if name.startswith("decoder.lm_head"):
        return name.removeprefix("decoder.")
    if name.startswith("decoder."):
        return f"model.{name.removeprefix('decoder.')}"
    if name.startswith("projector."):
        return name.replace("projector.fc1", "model.mm_projector.0").replace(
            "projector.fc2", "model.mm_projector.2"
        )
    if match := re.match(r"vision\.stem\.(\d)\.(.+)", name):
        return f"{vision}patch_embed.{match[1]}.reparam_conv.{match[2]}"
    if name.startswith("vision.final.conv."):
        return f"{vision}conv_exp.reparam_conv.{name.rpartition('.')[2]}"
    if name.startswith("vision.final."):
        return f"{vision}conv_exp.{name.removeprefix('vision.final.')}"
    match = re.match(r"vision\.stages\.(\d)\.(\w+)\.(.+)", name)
    assert match is not None, name
    stage, part, rest = int(match[1]), match[2], match[3]
    # Per stage: downsampling (except in the first), a position encoding (in the last two), the blocks.
    blocks_at = 2 * stage + max(0, stage - 2)
    if part == "downsample":
        index, leaf = rest.split(".")
        kind = "lkb_reparam" if index == "0" else "reparam_conv"
        return f"{vision}network.{2 * stage - 1 + max(0, stage - 3)}.proj.{index}.{kind}.{leaf}"
    if part == "position":
        return f"{vision}network.{blocks_at - 1}.reparam_conv.{rest}"
    for ours, theirs in (
        (r"\.mixer\.", ".token_mixer.reparam_conv."),
        (r"\.attention\.", ".token_mixer."),
        (r"\.ffn\.(conv|bn)\.", r".convffn.conv.\1."),
        (r"\.ffn\.", ".convffn."),
        (r"\.attention_scale$", ".layer_scale_1"),
        (r"\.ffn_scale$", ".layer_scale_2" if stage > 2 else ".layer_scale"),
    ):
        rest, count = re.subn(ours, theirs, rest)
        if count:
            break
    return f"{vision}network.{blocks_at}.{rest}"


def random_values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Chunks of float32 that keep activations of order one."""
    size = int(np.prod(shape))
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        if name.endswith(("running_mean", ".bias")):
            yield np.zeros(count, np.float32)
        elif name.endswith("_scale"):
            yield np.full(count, 0.1, np.float32)
        elif len(shape) == 1:
            yield np.ones(count, np.float32)
        elif "embed_tokens" in name:
            yield 0.02 * rng.standard_normal(count, np.float32)
        else:
            yield rng.standard_normal(count, np.float32) / np.float32(fan_in**0.5)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, as raw bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_weights(path: Path, config: ModelConfig, seed: int) -> None:
    """Write model.safetensors, tensor by tensor."""
    shapes = weight_shapes(config)
    # Apple keeps layer scales as [C, 1, 1] and an unused classifier.
    stored = {n: (*s, 1, 1) if n.endswith("_scale") else s for n, s in shapes.items()}
    names = {apple_name(name): (name, shape) for name, shape in stored.items()}
    classifier = "model.vision_tower.vision_tower.model.head.proj"
    names[classifier] = (classifier, (FEATURES, 768))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for stored_name, (_, shape) in names.items():
        end = offset + 2 * int(np.prod(shape))
        header[stored_name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in names.values():
            for chunk in random_values(name, shape, rng):
                file.write(to_bfloat16(chunk).data)


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE of Qwen2's size, whose merges are all pairs and then triples of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    tokens, merges = list(alphabet), []
    first = 0
    while len(tokens) < NUM_TOKENS:
        left = tokens[first]
        for right in alphabet[: NUM_TOKENS - len(tokens)]:
            tokens.append(left + right)
            merges.append(f"{left} {right}")
        first += 1
    (folder / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    added = {token: NUM_TOKENS + i for i, token in enumerate(SPECIAL)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        )
    )


def qwen2_settings(decoder: DecoderConfig) -> dict[str, object]:
    """What config.json says of a decoder, by the keys of transformers."""
    return {
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": decoder.max_position_embeddings,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tied,
        "use_sliding_window": False,
        "vocab_size": decoder.vocab_size,
    }


def write_config(folder: Path, config: ModelConfig) -> None:
    """Write config.json and generation_config.json with Apple's keys."""
    decoder = config.decoder
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlavaQwen2ForCausalLM"],
                "model_type": "llava_qwen2",
                "image_aspect_ratio": "pad",
                "mm_hidden_size": FEATURES,
                "mm_projector_type": "mlp2x_gelu",
                "mm_vision_tower": "mobileclip_l_1024",
                "torch_dtype": "bfloat16",
                **qwen2_settings(decoder),
            },
            indent=2,
        )
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [NUM_TOKENS + 2, NUM_TOKENS], "pad_token_id": NUM_TOKENS})
    )


def write_checkpoint(folder: Path, size: str, num_layers: int | None = None, seed: int = 0) -> None:
    """Write a whole checkpoint of a published size."""
    write_model(folder, published_config(size, num_layers), seed)


def write_model(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write a whole checkpoint of any dimensions, with the released vocabulary."""
    folder.mkdir(parents=True)
    write_config(folder, config)
    write_tokenizer(folder)
    write_weights(folder / "model.safetensors", config, seed)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=DECODERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the real model")
    arguments = parser.parse_args()
    write_checkpoint(arguments.folder, arguments.size, arguments.layers)


if __name__ == "__main__":
    main()
