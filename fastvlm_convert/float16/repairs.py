"""What a range scan means for a recipe: which repairs it needs, and what stays at risk."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Self

import yaml

from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.float16.report import MIN_HEADROOM, OpRange, RangeReport
from fastvlm_convert.io_names import decoder_op, op_component
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import MAX_RESIDUAL_SHIFT, FloatSettings, RepairSettings
from fastvlm_convert.targets import BACKENDS, Target
from fastvlm_convert.weights.storage import FLOAT16_MAX

# Rounding a key to float16 moves a score by up to 2^-11 of what the key's bias adds to it: by 2 where that
# is 4096, before the division by sqrt(head_dim).
MIN_BIAS_RATIO: Final = 8.0
MIN_BIASED_SCORE: Final = 4096.0

_RESIDUAL: Final = ("o", "attn_residual", "down", "residual")  # all that is scaled with the stream
_CACHED: Final = ("k_rotated", "v_heads")


@dataclass(frozen=True)
class Repair:
    """One setting of `repairs` that a model needs.

    Attributes:
        setting: Its name.
        value: Its value.
        reason: What the scan found.
    """

    setting: str
    value: int | tuple[int, ...]
    reason: str


def needed_repairs(
    report: RangeReport, recipe: Recipe, targets: Iterable[Target] = BACKENDS
) -> tuple[Repair, ...]:
    """The repairs that a model needs in the precision of a recipe.

    - `residual_shift`: where a sum of the residual stream, or what is added to it, has less than
      `MIN_HEADROOM`, the smallest shift that gives it that.
    - `separate_key_bias`: layers where biased keys are `MIN_BIAS_RATIO` times larger than those without bias
      and scores reach `MIN_BIASED_SCORE`: rounding the sum then loses what the content says.
    - `rescaled_keys`: layers whose rotated queries, or keys as cached, have less than `MIN_HEADROOM`.
    - `float32_scores`: layers whose scores, before they are divided by sqrt(head_dim), have less.

    Args:
        report: The scan.
        recipe: Its precisions; its own repairs are left aside.
        targets: Where it is to run; everywhere by default.
    """
    plain = replace(recipe, repairs=RepairSettings())
    decoder = _Decoder.on(targets, recipe)
    biased = [layer for layer in _layers(report) if _bias_dominates(report, layer, recipe, decoder)]
    apart = replace(recipe, repairs=RepairSettings(separate_key_bias=tuple(biased)))
    risks = at_risk(report, plain, targets)
    found: list[Repair] = []
    residual = next((o for o in risks if _part(o.op) in _RESIDUAL), None)
    if residual is not None:
        shift = math.ceil(math.log2(MIN_HEADROOM * residual.max_abs / FLOAT16_MAX))
        found.append(Repair("residual_shift", min(shift, MAX_RESIDUAL_SHIFT), _reaches(residual)))
    keys = [o for o in at_risk(report, apart, targets) if _part(o.op) in ("q_rotated", "k_rotated")]
    scores = [o for o in risks if _part(o.op) == "attn_scores"]
    for setting, ops in (("rescaled_keys", keys), ("float32_scores", scores)):
        if ops:
            layers = tuple(sorted({_layer(o.op) for o in ops}))
            found.append(Repair(setting, layers, _reaches(ops[0])))
    if biased:
        worst = max(biased, key=lambda layer: _size(report, layer, "k_rotated"))
        sizes = [_size(report, worst, part) for part in ("k_rotated", "k_unbiased")]
        reason = f"keys of layer {worst} reach {sizes[0]:.0f}, without their bias {sizes[1]:.0f}"
        found.append(Repair("separate_key_bias", tuple(biased), reason))
    return tuple(found)


def settings_of(repairs: tuple[Repair, ...]) -> RepairSettings:
    """Repairs as a section of a recipe."""
    return RepairSettings(**{repair.setting: repair.value for repair in repairs})  # type: ignore[arg-type]


def repaired_recipe(recipe: Recipe, name: str, repairs: tuple[Repair, ...]) -> Recipe:
    """A recipe under another name, with these repairs and no others."""
    description = recipe.description if not repairs else f"{recipe.description}; repaired for float16"
    return replace(recipe, name=name, description=description, repairs=settings_of(repairs))


def recipe_text(recipe: Recipe, repairs: tuple[Repair, ...]) -> str:
    """A recipe as a YAML file that states every setting, with the reasons for its repairs on top."""
    reasons = [f"# repairs.{r.setting}: {r.reason}\n" for r in repairs] or ["# float16 needs no repairs\n"]
    settings = json.loads(json.dumps(recipe.to_dict()))  # tuples become lists
    readable = "\\u0085" not in json.dumps(settings)  # PyYAML reads a raw U+0085 back as a line break
    return "".join(reasons) + yaml.safe_dump(settings, sort_keys=False, allow_unicode=readable, width=110)


def missing_repairs(
    report: RangeReport, recipe: Recipe, targets: Iterable[Target] = BACKENDS
) -> tuple[Repair, ...]:
    """The repairs that a model needs and a recipe lacks."""

    def has(repair: Repair) -> bool:
        own = getattr(recipe.repairs, repair.setting)
        if isinstance(repair.value, int):
            return bool(own >= repair.value)
        if repair.setting == "float32_scores":
            return all(recipe.repairs.has_float32_scores(layer) for layer in repair.value)
        return set(repair.value) <= set(own)

    return tuple(repair for repair in needed_repairs(report, recipe, targets) if not has(repair))


def at_risk(report: RangeReport, recipe: Recipe, targets: Iterable[Target] = BACKENDS) -> list[OpRange]:
    """Operations that a recipe leaves to float16 with less than `MIN_HEADROOM`, the riskiest first.

    Sizes are those after the recipe's repairs; rescaled keys and queries are taken to meet in the middle.

    Args:
        report: The scan.
        recipe: Its precisions and repairs.
        targets: Where it is to run; everywhere by default.
    """
    return [o for o in rounded(report, recipe, targets) if o.headroom < MIN_HEADROOM]


def rounded(report: RangeReport, recipe: Recipe, targets: Iterable[Target] = BACKENDS) -> list[OpRange]:
    """Operations that a recipe leaves to float16, the riskiest first; see `at_risk`."""
    found = _as_exported(report, recipe, _Decoder.on(targets, recipe))
    return sorted(found, key=lambda o: o.headroom)


@dataclass(frozen=True)
class _Decoder:
    """What the decoder rounds to float16 on any of some targets.

    Attributes:
        settings: Its precision, float16 where a recipe leaves it open and a target computes in that.
        has_float16_cache: Whether keys and values are float16 whatever the arithmetic.
    """

    settings: FloatSettings
    has_float16_cache: bool

    @classmethod
    def on(cls, targets: Iterable[Target], recipe: Recipe) -> Self:
        """On these targets."""
        backends = [backend_of(target) for target in targets]
        own = {backend.auto_compute for backend in backends}
        return cls(
            recipe.decoder.on("float16" if "float16" in own else "float32"),
            any(backend.has_float16_cache(recipe) for backend in backends),
        )


def _as_exported(report: RangeReport, recipe: Recipe, decoder: _Decoder) -> Iterator[OpRange]:
    """Operations that round to float16, as large as they are after the recipe's repairs."""
    repairs = recipe.repairs
    for op in report.ops:
        part = _part(op.op)
        if part == "k_unbiased" or not _rounds(op.op, recipe, decoder):
            continue
        if op_component(op.op) == "vision":
            yield op
        elif part in _RESIDUAL:
            yield replace(op, max_abs=op.max_abs * 2.0**-repairs.residual_shift)
        elif part in ("qkv", "q_rotated", "k_rotated"):
            query, key = _query_and_key(report, _layer(op.op), repairs)
            value = _size(report, _layer(op.op), "v_heads")
            sizes = {"qkv": max(query, key, value), "q_rotated": query, "k_rotated": key}
            yield replace(op, max_abs=min(op.max_abs, sizes[part]))
        else:
            yield op


def _rounds(op: str, recipe: Recipe, decoder: _Decoder) -> bool:
    """Whether the result of an operation is float16 in the exported program."""
    if op_component(op) == "vision":
        return recipe.vision.computes_in(op.removesuffix("_scores")) == "float16"
    if _part(op) in _CACHED and decoder.has_float16_cache:
        return True
    if _part(op) == "attn_scores":
        if recipe.repairs.has_float32_scores(_layer(op)):
            return False
        op = op.removesuffix("_scores")
    return decoder.settings.computes_in("lm_head" if op == "logits" else op) == "float16"


def _query_and_key(report: RangeReport, layer: int, repairs: RepairSettings) -> tuple[float, float]:
    """Largest rotated query and cached key of a layer after its repairs."""
    query = _size(report, layer, "q_rotated")
    key = _size(report, layer, "k_unbiased" if layer in repairs.separate_key_bias else "k_rotated")
    return (math.sqrt(query * key),) * 2 if layer in repairs.rescaled_keys else (query, key)


def _bias_dominates(report: RangeReport, layer: int, recipe: Recipe, decoder: _Decoder) -> bool:
    """Whether a float16 cache holds little of a layer's keys beside their bias."""
    if not _rounds(decoder_op(layer, "k_rotated"), recipe, decoder):
        return False
    biased, plain = _size(report, layer, "k_rotated"), _size(report, layer, "k_unbiased")
    return biased >= MIN_BIAS_RATIO * plain and _size(report, layer, "attn_scores") >= MIN_BIASED_SCORE


def _size(report: RangeReport, layer: int, part: str) -> float:
    name = decoder_op(layer, part)
    return next((o.max_abs for o in report.ops if o.op == name), 0.0)


def _layers(report: RangeReport) -> list[int]:
    return [_layer(o.op) for o in report.ops if _part(o.op) == "attn_scores"]


def _layer(op: str) -> int:
    match = re.match(r"l(\d+)_", op)
    assert match is not None, f"'{op}' is in no layer of the decoder"
    return int(match[1])


def _part(op: str) -> str:
    """What an operation is in its decoder layer; empty for others."""
    match = re.match(r"l\d+_(\w+)$", op)
    return match[1] if match else ""


def _reaches(op: OpRange) -> str:
    return f"{op.op} reaches {op.max_abs:.0f}, {op.headroom:.1f}x headroom"
