"""Read a PEFT adapter folder and merge it into a checkpoint's weights.

PEFT saves `adapter_config.json` and `adapter_model.safetensors` (or `.bin`); LLaVA's training adds
`non_lora_trainables.bin` with tensors that were trained whole, the projector above all.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_convert.checkpoint.files import read_json
from fastvlm_convert.checkpoint.torch_zip import read_torch_zip
from fastvlm_convert.errors import CheckpointError, shown
from fastvlm_convert.regular_file import is_there
from fastvlm_convert.weights.lora import LowRank, merge_low_rank
from fastvlm_convert.weights.safetensors_file import read_safetensors
from fastvlm_convert.weights.source import Weight, WeightSource

_LOW_RANK = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?$")
_EMBED, _HEAD = "decoder.embed_tokens.weight", "decoder.lm_head.weight"
_PEFT_ALPHA = 8  # PEFT's default for lora_alpha
_WRAPPERS = ("base_model.model.", "base_model.")
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "use_qalora", "lora_bias", "alora_invocation_tokens")
# Initialisations that change the base weights too: the adapter belongs to those, not to the checkpoint.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as stored; module names are those of the checkpoint it was trained on."""

    path: Path
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, Weight]


def read_adapter(path: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        CheckpointError: It is no adapter folder, an adapter lacks a half, or it uses a variant of LoRA
            that cannot be merged by W + scale * B A.
    """
    config = read_json(path / "adapter_config.json")
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"peft_type is {shown(config['peft_type'])}; supported: 'LORA'", where=path)
    for key in _UNSUPPORTED:
        if config.get(key):
            raise CheckpointError(
                f"{key} is set; only plain LoRA can be merged here",
                where=path / "adapter_config.json",
                hint="merge it with PEFT's merge_and_unload() and convert the merged checkpoint",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise CheckpointError(
            f"init_lora_weights is {shown(start)}, which also changes the weights that are adapted",
            where=path / "adapter_config.json",
            hint="save it as plain LoRA (PEFT: path_initial_model_for_weight_conversion)",
        )
    tensors = _read_tensors(path)
    halves: dict[str, dict[str, Weight]] = {}
    replaced: dict[str, Weight] = {}
    transposed: set[str] = set()
    for name, weight in tensors.items():
        bare = _unwrapped(name)
        match = _LOW_RANK.match(bare)
        if match is None:
            replaced[bare] = weight
            continue
        target = f"{match['module']}.weight"
        halves.setdefault(target, {})[match["side"]] = weight
        if match["kind"]:
            transposed.add(target)
    low_rank = {
        target: _low_rank(target, sides, config, target in transposed, path)
        for target, sides in halves.items()
    }
    return Adapter(path, low_rank, replaced)


def merge_adapter(weights: WeightSource, adapter: Adapter, canonical: Mapping[str, str]) -> dict[str, Weight]:
    """A view with the adapter merged.

    Args:
        weights: The checkpoint's weights by canonical name.
        adapter: The adapter.
        canonical: Stored name -> canonical name, for the adapter's targets.

    Raises:
        CheckpointError: A target is not in the checkpoint or has another shape.
    """
    merged = dict(weights)
    adapted = {canonical.get(name) for name in adapter.low_rank}
    replaced = {canonical.get(name) for name in adapter.replaced}
    if _HEAD not in weights and _EMBED in weights and (_EMBED in adapted or _HEAD in adapted | replaced):
        merged[_HEAD] = weights[_EMBED]  # of a tied table only one of its two uses was adapted
    for stored, weight in adapter.replaced.items():
        name = _target(stored, canonical, merged, adapter.path)
        if weight.shape != merged[name].shape:
            raise _shape_error(stored, weight.shape, merged[name].shape, adapter.path)
        merged[name] = weight
    for stored, low_rank in adapter.low_rank.items():
        name = _target(stored, canonical, merged, adapter.path)
        shape = merged[name].shape
        update = (low_rank.b.shape[0], low_rank.a.shape[1])
        if low_rank.transposed:
            update = update[::-1]
        if update != shape[:2] or math.prod(shape[2:]) != 1:
            raise _shape_error(stored, update, shape, adapter.path)
        merged[name] = merge_low_rank(merged[name], low_rank)
    return merged


def _read_tensors(path: Path) -> dict[str, Weight]:
    if is_there(path / "adapter_model.safetensors"):
        tensors = read_safetensors(path / "adapter_model.safetensors")
    elif is_there(path / "adapter_model.bin"):
        tensors = read_torch_zip(path / "adapter_model.bin")
    else:
        raise CheckpointError("neither adapter_model.safetensors nor adapter_model.bin is here", where=path)
    if is_there(path / "non_lora_trainables.bin"):
        tensors |= read_torch_zip(path / "non_lora_trainables.bin")
    return tensors


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name.replace(".base_layer.", ".")  # the adapted layer's own bias or table, trained with it


def _low_rank(
    target: str, sides: Mapping[str, Weight], config: Mapping[str, Any], transposed: bool, path: Path
) -> LowRank:
    if set(sides) != {"A", "B"} or len(sides["A"].shape) != 2 or len(sides["B"].shape) != 2:
        raise CheckpointError(f"the adapter of '{target}' is incomplete", where=path)
    rank = sides["A"].shape[0]
    if sides["B"].shape[1] != rank or not rank:
        raise CheckpointError(f"the two halves of the adapter of '{target}' have different ranks", where=path)
    where = path / "adapter_config.json"
    alpha = _by_pattern(config.get("alpha_pattern"), target, config.get("lora_alpha", _PEFT_ALPHA), where)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise CheckpointError(f"lora_alpha is {shown(alpha)}, expected a number", where=where)
    return LowRank(
        a=sides["A"],
        b=sides["B"],
        scale=alpha / (rank**0.5 if config.get("use_rslora") else rank),
        transposed=transposed,
    )


def _by_pattern(patterns: object, target: str, default: object, where: Path) -> object:
    """PEFT's override per module: a key is a regular expression for the end of the module's name."""
    module = target.removesuffix(".weight")
    for key, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error as error:
            raise CheckpointError(
                f"alpha_pattern has the malformed pattern {shown(key)}", where=where
            ) from error
    return default


def _target(stored: str, canonical: Mapping[str, str], weights: WeightSource, path: Path) -> str:
    name = canonical.get(stored)
    if name is None or name not in weights:
        raise CheckpointError(
            f"the adapter changes '{stored}', which the checkpoint does not have",
            where=path,
            hint="was it trained on another checkpoint or in the other layout (Apple's, transformers')?",
        )
    return name


def _shape_error(
    name: str, adapter: tuple[int, ...], checkpoint: tuple[int, ...], path: Path
) -> CheckpointError:
    return CheckpointError(
        f"the adapter of '{name}' has shape {list(adapter)}, the checkpoint's tensor {list(checkpoint)}",
        where=path,
        hint="use the checkpoint that the adapter was trained on",
    )
