"""Read an adapter folder of mlx-lm or mlx-vlm: `adapter_config.json` and `adapters.safetensors`.

A layer computes W x + scale ((x A) B), with A [columns, rank] and B [rank, rows]. mlx-lm, and mlx-vlm today,
call them `lora_a` and `lora_b` and state `scale`; mlx-vlm's first format calls them `A` and `B` and has
`alpha` for the scale.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.checkpoint.adapter import Adapter
from fastvlm_convert.checkpoint.files import read_json
from fastvlm_convert.checkpoint.tokenizer import has_tokenizer
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights.lora import LowRank
from fastvlm_convert.weights.safetensors_file import read_safetensors
from fastvlm_convert.weights.source import Weight, transposed

WEIGHTS: Final = "adapters.safetensors"
_HALF = re.compile(r"(?P<module>.+)\.(?:lora_(?P<side>[ab])|(?P<old>[AB]))")
_TABLES = ("embed_tokens",)


def read_mlx(path: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        CheckpointError: A file is missing or damaged, or the adapter is none that adds products to weights.
    """
    where = path / "adapter_config.json"
    config = read_json(where)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "full"):
        raise CheckpointError(
            f"fine_tune_type is {kind!r}; supported: 'lora', 'full'",
            where=where,
            hint="fuse it with the tool that trained it, and convert the fused checkpoint",
        )
    halves: dict[str, dict[str, Weight]] = {}
    replaced: dict[str, Weight] = {}
    for stored, weight in read_safetensors(path / WEIGHTS).items():
        name = _apple_name(stored)
        if match := _HALF.fullmatch(name):
            side = match["side"] or match["old"].lower()
            halves.setdefault(f"{match['module']}.weight", {})[side] = weight
        else:
            replaced[name] = weight
    if not (halves or replaced):
        raise CheckpointError("the adapter holds no tensor", where=path / WEIGHTS, hint="save it again")
    scale = _scale(config, where) if halves else 1.0
    return Adapter(
        path=path,
        layout="llava_qwen2",
        low_rank={name: _low_rank(name, sides, scale, path) for name, sides in halves.items()},
        replaced=replaced,
        rows={},
        copied=frozenset(),
        shares_table=True,  # MLX multiplies by the adapted embedding where it serves as the head
        files=(where, path / WEIGHTS),
        tokenizer=path if has_tokenizer(path) else None,
        notes=("the tokenizer is the adapter's own",) if has_tokenizer(path) else (),
    )


def _apple_name(name: str) -> str:
    """A name in Apple's layout; mlx-vlm renames parts of it when it loads a checkpoint."""
    name = name.removeprefix("language_model.")
    return f"model.{name}" if name.startswith("mm_projector.") else name


def _scale(config: Mapping[str, Any], where: Path) -> float:
    values = config.get("lora_parameters")
    if not isinstance(values, dict):
        return _number(config, "alpha", where)
    scale = _number(values, "scale", where)
    if "alpha" in values:  # mlx-lm until 2024
        scale *= _number(values, "alpha", where) / (_number(values, "rank", where) or 1)
    return scale


def _number(values: Mapping[str, Any], key: str, where: Path) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise CheckpointError(f"the adapter's {key} is {value!r}, expected a number", where=where)
    return float(value)


def _low_rank(target: str, sides: Mapping[str, Weight], scale: float, path: Path) -> LowRank:
    if set(sides) != {"a", "b"}:
        raise CheckpointError(f"the adapter of '{target}' is incomplete", where=path)
    a, b = sides["a"], sides["b"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or not b.shape[0]:
        raise CheckpointError(
            f"the halves of the adapter of '{target}' have shapes {list(a.shape)} and {list(b.shape)}, "
            "expected [columns, rank] and [rank, rows]",
            where=path,
        )
    if target.removesuffix(".weight").endswith(_TABLES):  # rows and columns change places
        return LowRank(up=a, down=b, scale=scale)
    return LowRank(up=transposed(b), down=transposed(a), scale=scale)
