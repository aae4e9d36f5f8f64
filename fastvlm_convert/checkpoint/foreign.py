"""Name what a folder holds when it is no float checkpoint of FastVLM, and say the next step.

These checks come before any shape is compared: "expected [151936, 896]" helps nobody who has packed weights.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.checkpoint.files import optional_json
from fastvlm_convert.errors import CheckpointError, shown
from fastvlm_convert.manifest import is_bundle
from fastvlm_convert.regular_file import is_there

_ORIGINAL: Final = "give the unquantized checkpoint that it was made from"
_MERGE: Final = "merge them with PEFT's merge_and_unload(), save the model and convert that"

# Ends of tensors' names that only quantized checkpoints have, and whose they are.
_PACKED: Final = (
    (".SCB", "bitsandbytes (int8)"),
    (".absmax", "bitsandbytes (4 bits)"),
    (".quant_state.bitsandbytes__nf4", "bitsandbytes (nf4)"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes (fp4)"),
    (".g_idx", "GPTQ"),
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "FP8"),
    (".weight_scale", "FP8 or int8"),
    (".scales", "MLX"),
)
# Patterns of files, what they are, and the next step; the first that is found is named.
_FOLDERS: Final = (
    ("global_step*/*_states.pt", "DeepSpeed ZeRO's partitions of a checkpoint",
     "run `python zero_to_fp32.py . pytorch_model.bin` there (DeepSpeed puts the script beside them)"),
    ("*_states.pt", "DeepSpeed ZeRO's partitions of a checkpoint",
     "run `python zero_to_fp32.py . pytorch_model.bin` in the folder above"),
    ("*.distcp", "a distributed checkpoint of PyTorch",
     "join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin"),
    ("pytorch_model_fsdp_*", "a distributed checkpoint of accelerate", "join it: accelerate merge-weights"),
    ("mm_projector.bin", "LLaVA's projector alone",
     "give the checkpoint of the whole model, and this file with --projector"),
    ("*.gguf", "a GGUF model, which llama.cpp reads", "give the checkpoint it was converted from"),
    ("weights*.npz", "a model of MLX", "give the checkpoint it was converted from"),
    ("*.mlpackage", "a Core ML package", "give the checkpoint it was converted from; `mil` shows packages"),
    ("onnx/*.onnx", "an ONNX model", "give the checkpoint it was converted from"),
    ("*.h5", "weights of TensorFlow", "give PyTorch's weights"),
    ("*.msgpack", "weights of Flax", "give PyTorch's weights"),
)  # fmt: skip


def refuse_other_folders(path: Path) -> None:
    """See that a folder without a checkpoint's files is not something else.

    Raises:
        CheckpointError: It is; names it.
    """
    if is_there(path / "adapter_config.json"):
        base = optional_json(path / "adapter_config.json").get("base_model_name_or_path")
        trained = f" ({shown(base)})" if isinstance(base, str) and base else ""
        raise CheckpointError(
            "this is an adapter, not a checkpoint",
            where=path,
            hint=f"give the checkpoint it was trained on{trained}, and this folder with --adapter",
        )
    if is_bundle(path):
        raise CheckpointError(
            "this is a bundle, not a checkpoint",
            where=path,
            hint="give the checkpoint it was exported from; `run`, `verify` and `bench` take bundles",
        )
    for pattern, what, hint in _FOLDERS:
        if any(path.glob(pattern)):
            raise CheckpointError(f"this is {what}", where=path, hint=hint)


def refuse_quantized_config(raw: Mapping[str, Any], path: Path) -> None:
    """See that config.json does not announce quantized weights.

    Raises:
        CheckpointError: It does; names the method.
    """
    where, settings = path / "config.json", raw.get("quantization_config")
    mlx = raw.get("quantization", settings)
    if isinstance(mlx, dict) and "bits" in mlx and "quant_method" not in mlx:
        raise CheckpointError(
            f"its weights are quantized by MLX ({shown(mlx['bits'])} bits)", where=where, hint=_ORIGINAL
        )
    if isinstance(settings, dict):
        method = settings.get("quant_method", "an unknown method")
        raise CheckpointError(f"its weights are quantized by {shown(method)}", where=where, hint=_ORIGINAL)


def refuse_other_tensors(names: Iterable[str], path: Path) -> None:
    """See that tensors' names are not those of quantized weights, or of adapters beside their weights.

    Raises:
        CheckpointError: They are; names the kind.
    """
    names = list(names)
    for end, whose in _PACKED:
        found = next((name for name in names if name.endswith(end)), None)
        if found is not None:
            raise CheckpointError(
                f"its weights are quantized: tensor {shown(found)} is {whose}'s", where=path, hint=_ORIGINAL
            )
    if any(".lora_A." in name or ".lora_B." in name for name in names):
        raise CheckpointError(
            "it holds LoRA adapters that are not merged into its weights", where=path, hint=_MERGE
        )
