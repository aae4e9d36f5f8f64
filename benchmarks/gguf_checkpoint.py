"""Write the decoder of a FastVLM checkpoint as GGUF, and quantize that as llama.cpp does.

    python -m benchmarks.gguf_checkpoint CHECKPOINT float16.gguf
    python -m benchmarks.gguf_checkpoint float16.gguf q4_0.gguf --quantize Q4_0

The float file is what llama.cpp's own converter makes of a Qwen2 model: matrices in float16, vectors in
float32, names from the `gguf` package. There is no tokenizer in it: we feed token ids. Quantizing needs
llama-cpp-python (`pip install 'fastvlm-convert[peers]'`, which compiles it).
"""

import argparse
import ctypes
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from benchmarks.text_checkpoint import qwen2_weights
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.weights.source import Weight

ARCHITECTURE = gguf.MODEL_ARCH.QWEN2


def gguf_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """The decoder's weights under GGUF's names.

    Raises:
        SystemExit: GGUF has no name for one.
    """
    names = gguf.get_tensor_name_map(ARCHITECTURE, checkpoint.config.decoder.num_layers)
    found = {}
    for theirs, weight in qwen2_weights(checkpoint.weights).items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise SystemExit(f"GGUF has no name for {theirs}")
        found[name] = weight
    return found


def _stored(weights: dict[str, Weight]) -> Iterator[tuple[str, np.dtype, Weight]]:
    """Each tensor with the dtype that it gets in the float file."""
    for name, weight in weights.items():
        yield name, np.dtype(np.float16 if len(weight.shape) == 2 else np.float32), weight


def write_gguf(checkpoint: Checkpoint, path: Path) -> Path:
    """Write the float file; tensors are streamed, one at a time."""
    decoder = checkpoint.config.decoder
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    writer.add_name("decoder")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(decoder.num_layers)
    writer.add_context_length(decoder.max_position_embeddings)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_feed_forward_length(decoder.intermediate_size)
    writer.add_head_count(decoder.num_heads)
    writer.add_head_count_kv(decoder.num_kv_heads)
    writer.add_rope_freq_base(decoder.rope_theta)
    writer.add_layer_norm_rms_eps(decoder.rms_norm_eps)
    writer.add_vocab_size(decoder.vocab_size)
    writer.add_tokenizer_model("none")
    weights = gguf_weights(checkpoint)
    for name, dtype, weight in _stored(weights):
        writer.add_tensor_info(name, weight.shape, dtype, weight.size * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, dtype, weight in _stored(weights):
        writer.write_tensor_data(weight.array().astype(dtype))
    writer.close()
    return path


def quantize_gguf(source: Path, target: Path, kind: str) -> Path:
    """Quantize with llama.cpp, as its own tool does it.

    Args:
        source: The float file.
        target: The file to write.
        kind: One of its file types: `Q4_0`, `Q4_K_M`.

    Raises:
        SystemExit: llama.cpp refuses it.
    """
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    if code != 0:
        raise SystemExit(f"llama.cpp does not quantize {source}: {code}")
    return target


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--quantize", metavar="KIND")
    asked = parser.parse_args()
    if asked.quantize is None:
        print(write_gguf(open_checkpoint(asked.source), asked.target))
    else:
        print(quantize_gguf(asked.source, asked.target, asked.quantize))


if __name__ == "__main__":
    main()
