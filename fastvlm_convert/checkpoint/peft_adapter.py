"""Read an adapter folder of PEFT, or of LLaVA's training.

PEFT saves `adapter_config.json` and `adapter_model.safetensors` (or `.bin`); LLaVA's training adds
`non_lora_trainables.bin` with tensors that were trained whole, the projector above all. docs/adapters.md
says what becomes of each of PEFT's options.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.checkpoint.adapter import Adapter, Rows
from fastvlm_convert.checkpoint.files import optional_json, read_json
from fastvlm_convert.checkpoint.module_patterns import matching_key
from fastvlm_convert.checkpoint.tokenizer import has_tokenizer
from fastvlm_convert.checkpoint.torch_zip import read_torch_zip
from fastvlm_convert.checkpoint.weight_files import refuse_empty
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.regular_file import is_there
from fastvlm_convert.weights.lora import LowRank
from fastvlm_convert.weights.safetensors_file import read_safetensors
from fastvlm_convert.weights.source import Weight, reshaped, transposed

CONFIG: Final = "adapter_config.json"
_WEIGHTS = {"adapter_model.safetensors": read_safetensors, "adapter_model.bin": read_torch_zip}
_WHOLE = "non_lora_trainables.bin"
_PEFT_ALPHA = 8  # PEFT's default for lora_alpha
_WRAPPERS = ("module.", "base_model.model.", "base_model.")
_LORA = re.compile(r"(?P<module>.+?)\.lora_(?P<part>\w+)(?P<rest>(?:\.[^.]+)*)")
_COPIED = re.compile(r"\.modules_to_save\.(?!weight$|bias$)[^.]+\.|\.modules_to_save\.")
_TOKENS = re.compile(
    r"(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_(?P<part>delta|original)(?:\.[^.]+)?"
)
_MERGE_FIRST = "merge it with PEFT's merge_and_unload(), save the model and convert that"

# Settings that change what an adapter computes in a way that W + scale B A does not express.
_OTHER_ARITHMETIC = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "target_parameters",
    "layer_replication", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Initialisations that change the base weights too: the adapter belongs to those, not to the checkpoint.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Methods that add to the model's input: there is no weight to merge them into.
_NO_WEIGHTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
)  # fmt: skip

Config = Mapping[str, Any]


def read_peft(path: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        CheckpointError: A file is missing or damaged, an adapter lacks a half, or it cannot be merged by
            adding products to weights and replacing weights and rows.
    """
    config = read_json(path / CONFIG)
    _check_config(config, path)
    tensors, files = _read_tensors(path)
    halves: dict[str, dict[str, Weight]] = {}
    replaced: dict[str, Weight] = {}
    rows: dict[str, Rows] = {}
    copied: set[str] = set()
    names: set[str] = set()  # of adapters; PEFT leaves the name out, other tools may not
    for stored, weight in tensors.items():
        name = _unwrapped(stored)
        if match := _TOKENS.fullmatch(name):
            if match["part"] == "delta":
                rows[f"{match['module']}.weight"] = _rows(match["module"], weight, config, path)
        elif match := _LORA.fullmatch(name):
            side, adapter = _half(match, stored, path)
            names.add(adapter)
            halves.setdefault(f"{match['module']}.weight", {})[side] = weight
        elif ".original_module." not in name:  # what a copy was made of, in a whole state dict
            bare = _COPIED.sub(".", name)
            replaced[bare] = weight
            if bare != name or _is_saved_module(bare, config):
                copied.add(bare)
    if len(names) > 1:
        raise CheckpointError(f"it holds several adapters: {', '.join(sorted(names))}", where=path)
    low_rank = {name: _low_rank(name, sides, config, path) for name, sides in halves.items()}
    if not (low_rank or replaced or rows):
        raise CheckpointError("the adapter holds no tensor", where=path, hint="save it again")
    return Adapter(
        path=path,
        layout=None,
        low_rank=low_rank,
        replaced=replaced,
        rows=rows,
        copied=frozenset(copied),
        shares_table=False,
        files=(path / CONFIG, *files),
        tokenizer=path if has_tokenizer(path) else None,
        notes=tuple(_notes(path, replaced)),
    )


def _check_config(config: Config, path: Path) -> None:
    where = path / CONFIG
    kind = config.get("peft_type", "LORA")
    if kind in _NO_WEIGHTS:
        raise CheckpointError(
            f"peft_type is {kind!r}: it adds inputs to the model, not to its weights, and cannot be merged",
            where=path,
        )
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise CheckpointError(
            f"peft_type is {kind!r}; supported: 'LORA', 'TRAINABLE_TOKENS'", where=path, hint=_MERGE_FIRST
        )
    for key in _OTHER_ARITHMETIC:
        if config.get(key):
            raise CheckpointError(
                f"{key} is set; only plain LoRA can be merged here", where=where, hint=_MERGE_FIRST
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise CheckpointError(
            f"init_lora_weights is {start!r}, which also changes the weights that are adapted",
            where=where,
            hint="save it as plain LoRA (PEFT: path_initial_model_for_weight_conversion), or " + _MERGE_FIRST,
        )


def _read_tensors(path: Path) -> tuple[dict[str, Weight], list[Path]]:
    found = [name for name in _WEIGHTS if is_there(path / name)]
    if not found:
        raise CheckpointError(
            f"neither {' nor '.join(_WEIGHTS)} is here",
            where=path,
            hint="give the folder that PEFT's save_pretrained() made",
        )
    files = [path / found[0]]
    tensors = _WEIGHTS[found[0]](files[0])
    if is_there(path / _WHOLE):
        files.append(path / _WHOLE)
        tensors |= read_torch_zip(files[1])
    for name, weight in tensors.items():
        if weight.shape == (0,):
            refuse_empty(name, weight.shape, path)
    return tensors, files


def _unwrapped(name: str) -> str:
    name = name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name.replace(".base_layer.", ".")  # the adapted layer's own bias or table, trained with it


def _half(match: re.Match[str], stored: str, path: Path) -> tuple[str, str]:
    """Which half a tensor is (`A`, `B`, with `embedding_` before it), and the adapter's name."""
    rest = [part for part in match["rest"].split(".") if part]
    if rest and rest[-1] == "weight":
        rest.pop()
    if match["part"] not in ("A", "B", "embedding_A", "embedding_B") or len(rest) > 1 or "bias" in rest:
        raise CheckpointError(
            f"the adapter has '{stored}', which is no part of plain LoRA", where=path, hint=_MERGE_FIRST
        )
    return match["part"], rest[0] if rest else "default"


def _low_rank(target: str, sides: Mapping[str, Weight], config: Config, path: Path) -> LowRank:
    embedding = any(side.startswith("embedding_") for side in sides)
    prefix = "embedding_" if embedding else ""
    if set(sides) != {f"{prefix}A", f"{prefix}B"}:
        raise CheckpointError(f"the adapter of '{target}' is incomplete", where=path)
    a, b = sides[f"{prefix}A"], sides[f"{prefix}B"]
    for side, weight in (("A", a), ("B", b)):
        refused = len(weight.shape) != 2 if embedding else len(weight.shape) not in (2, 4)
        if refused or (side == "B" and set(weight.shape[2:]) > {1}) or len(a.shape) != len(b.shape):
            expected = "[rank, columns]" if side == "A" else "[rows, rank]"
            raise CheckpointError(
                f"lora_{prefix}{side} of '{target}' has shape {list(weight.shape)}, expected {expected}",
                where=path,
            )
    rank = a.shape[0]
    if len(b.shape) == 4 and 0 < b.shape[1] < rank and rank % b.shape[1] == 0:
        raise CheckpointError(
            f"'{target}' is a convolution in groups, whose adapter nothing can merge",
            where=path,
            hint="train again without it in target_modules",
        )
    if b.shape[1] != rank or not rank:
        raise CheckpointError(f"the two halves of the adapter of '{target}' have different ranks", where=path)
    alpha = _alpha(target, config, path / CONFIG)
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if embedding:
        return LowRank(up=transposed(a), down=transposed(b), scale=scale)
    return LowRank(up=reshaped(b, b.shape[:2]), down=a, scale=scale)


def _alpha(target: str, config: Config, where: Path) -> float:
    """PEFT's override per module, or its default."""
    alpha, patterns = config.get("lora_alpha", _PEFT_ALPHA), config.get("alpha_pattern")
    if isinstance(patterns, dict):
        try:
            key = matching_key(patterns, target.removesuffix(".weight"))
        except ValueError as error:
            raise CheckpointError(f"alpha_pattern has the malformed pattern {error}", where=where) from error
        alpha = alpha if key is None else patterns[key]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise CheckpointError(f"lora_alpha is {alpha!r}, expected a number", where=where)
    return alpha


def _is_saved_module(name: str, config: Config) -> bool:
    """Whether a tensor belongs to a module that `modules_to_save` trained as a copy."""
    saved = config.get("modules_to_save")
    ends = tuple(end for end in saved if isinstance(end, str) and end) if isinstance(saved, list) else ()
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts)))


def _rows(module: str, values: Weight, config: Config, path: Path) -> Rows:
    numbers = config.get("token_indices", config.get("trainable_token_indices"))
    if isinstance(numbers, dict):
        found = [value for key, value in numbers.items() if f".{module}".endswith(f".{key}")]
        numbers = found[0] if found else None
    if (
        not isinstance(numbers, list)
        or not all(type(number) is int and number >= 0 for number in numbers)
        or len(set(numbers)) != len(numbers)
        or len(values.shape) != 2
        or values.shape[0] != len(numbers)
        or not numbers
    ):
        raise CheckpointError(
            f"'{module}' has {values.shape[0] if values.shape else 0} trained rows, which "
            "trainable_token_indices does not name, each once",
            where=path / CONFIG,
        )
    return Rows(tuple(numbers), values)


def _notes(path: Path, replaced: Mapping[str, Weight]) -> list[str]:
    notes = []
    if has_tokenizer(path):
        notes.append("the tokenizer is the adapter's own")
    trained = optional_json(path / "config.json")  # LLaVA's training puts its settings there
    keys = ("unfreeze_mm_vision_tower", "tune_mm_mlp_adapter", "mm_projector_lr")
    said = [key for key in keys if trained.get(key)]
    is_llava = str(trained.get("model_type", "")).startswith("llava")
    frozen = trained.get("freeze_mm_mlp_adapter") is True
    has_projector = any(".mm_projector." in name for name in replaced)
    if is_llava and said and not frozen and not has_projector:
        notes.append(
            f"the adapter's config.json says that more than LoRA was trained ({', '.join(said)}), but the "
            f"projector is not in it: is {_WHOLE} missing?"
        )
    return notes
