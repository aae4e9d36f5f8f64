"""Write the decoder of a FastVLM checkpoint as a plain Qwen2 model in transformers' form.

    python -m benchmarks.text_checkpoint CHECKPOINT FOLDER

Programs that know nothing of FastVLM read such a folder: transformers, onnxruntime-genai's builder. Weights
are streamed. Those that are all bfloat16 stay so, others become float32, so that no number changes.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.random_checkpoint import qwen2_settings, to_bfloat16
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.checkpoint.tokenizer import tokenizer_json
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.source import Weight, WeightSource


def qwen2_weights(weights: WeightSource) -> dict[str, Weight]:
    """The decoder's weights under the names of transformers' Qwen2ForCausalLM."""
    found = {}
    for name, weight in weights.items():
        if name.startswith("decoder."):
            rest = name.removeprefix("decoder.")
            found[rest if rest.startswith("lm_head.") else f"model.{rest}"] = weight
    return found


def qwen2_config(decoder: DecoderConfig, eos_token_ids: tuple[int, ...], dtype: str) -> dict[str, object]:
    """The content of its config.json.

    Raises:
        SystemExit: Head and table have different numbers of rows, for which the format has no word.
    """
    if decoder.embed_rows != decoder.vocab_size:
        raise SystemExit(f"a table of {decoder.embed_rows} rows and a head of {decoder.vocab_size}")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": eos_token_ids[-1],
        "eos_token_id": list(eos_token_ids),
        "torch_dtype": dtype,
        **qwen2_settings(decoder),
    }


def write_tensors(path: Path, weights: WeightSource, dtype: str) -> None:
    """Write a safetensors file.

    Args:
        path: The file.
        weights: What it holds.
        dtype: `bfloat16` or `float32`.
    """
    kind, width = ("BF16", 2) if dtype == "bfloat16" else ("F32", 4)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, weight in weights.items():
        end = offset + width * weight.size
        header[name] = {"dtype": kind, "shape": weight.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for weight in weights.values():
            for chunk in weight.chunks():
                file.write((to_bfloat16(chunk) if width == 2 else np.ascontiguousarray(chunk)).data)


def write_qwen2(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the folder, which must not exist."""
    weights = qwen2_weights(checkpoint.weights)
    dtype = "bfloat16" if {w.dtype for w in weights.values()} == {"bfloat16"} else "float32"
    folder.mkdir(parents=True)
    config = qwen2_config(checkpoint.config.decoder, checkpoint.eos_token_ids, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
    (folder / "tokenizer.json").write_bytes(tokenizer_json(checkpoint.tokenizer))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    write_tensors(folder / "model.safetensors", weights, dtype)
    return folder


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    print(write_qwen2(open_checkpoint(asked.checkpoint), asked.folder))


if __name__ == "__main__":
    main()
