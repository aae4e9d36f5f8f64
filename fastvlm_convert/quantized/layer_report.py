"""What quantization did to every layer: recorded in quantized.json, and shown as a table by component."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastvlm_convert.arithmetic import ceil_div, num_elements
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.quantized.layer_plan import LayerPlan, indivisible, ragged, scheme_of
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme, Scheme
from fastvlm_convert.quantized.sqnr import SquaredSums
from fastvlm_convert.recipe_settings import BLOCK_SIZES, MAX_GROUP_SIZE, SchemeName, Solver
from fastvlm_convert.weights.file_tensors import MAX_TENSOR_AXES, MAX_TENSOR_ELEMENTS
from fastvlm_convert.weights.parts import PARTS, part_of


@dataclass(frozen=True)
class LayerReport:
    """One layer's weight, in the words of a recipe's rules.

    Attributes:
        layer: Name without `.weight`.
        shape: Dimensions.
        scheme: How it is stored.
        block_size: Integers: columns that share a scale, or `channel`.
        symmetric: Integers: without zero points.
        group_size: Palettes: rows that share a table.
        channel_scale: Palettes: every row has a scale.
        solver: What found the integers; `search` where it stays in float.
        reason: Why it stays in float, or has smaller blocks or groups than its rule said; else None.
        stored_bits: Bits of it in a bundle.
        squared_sum: Sum of the squares of its floats, six digits; None in float.
        sqnr_db: Signal to noise of the integers against the floats; None in float or where they are equal.
    """

    layer: str
    shape: tuple[int, ...]
    scheme: SchemeName
    block_size: int | Literal["channel"]
    symmetric: bool
    group_size: int
    channel_scale: bool
    solver: Solver
    reason: str | None
    stored_bits: int
    squared_sum: float | None
    sqnr_db: float | None

    def __post_init__(self) -> None:
        if not 1 < len(self.shape) <= MAX_TENSOR_AXES or not all(n > 0 for n in self.shape):
            raise CheckpointError(f"layer '{self.layer}' has an impossible shape {list(self.shape)}")
        if num_elements(self.shape) > MAX_TENSOR_ELEMENTS:
            raise CheckpointError(f"layer '{self.layer}' has an absurd shape {list(self.shape)}")
        if self.block_size != "channel":
            if self.block_size not in BLOCK_SIZES:
                raise CheckpointError(f"layer '{self.layer}' has the impossible block_size {self.block_size}")
            problem = indivisible(self.shape, self.block_size)
            if problem is not None:
                raise CheckpointError(f"layer '{self.layer}' cannot have blocks: {problem}")
        if not 1 <= self.group_size <= MAX_GROUP_SIZE:
            raise CheckpointError(f"layer '{self.layer}' has the impossible group_size {self.group_size}")
        if self.scheme.startswith("palette") and (problem := ragged(self.shape[0], self.group_size)):
            raise CheckpointError(f"layer '{self.layer}' cannot have tables: {problem}")
        if not all(math.isfinite(x) for x in (self.squared_sum, self.sqnr_db) if x is not None):
            raise CheckpointError(f"the figures of layer '{self.layer}' are not finite")
        if self.quantized is not None:
            rows, columns = self.shape[0], num_elements(self.shape[1:])
            if self.stored_bits != self.quantized.stored_bits(rows, columns) or self.squared_sum is None:
                raise CheckpointError(f"the figures of layer '{self.layer}' contradict its scheme")

    @property
    def quantized(self) -> Scheme | None:
        """Its scheme; None in float."""
        return scheme_of(self.scheme, self.block_size, self.symmetric, self.group_size, self.channel_scale)

    @property
    def plan(self) -> LayerPlan:
        """The plan that was followed."""
        return LayerPlan(self.layer, self.shape, self.quantized, self.solver, self.reason, self.stored_bits)

    @property
    def size(self) -> int:
        """Number of weights."""
        return num_elements(self.shape)


def layer_reports(plans: Sequence[LayerPlan], sums: Callable[[str], SquaredSums]) -> tuple[LayerReport, ...]:
    """What was done to every layer.

    Args:
        plans: What was to be done.
        sums: Errors of a quantized weight, by its name.
    """
    return tuple(
        _layer_report(plan, None if plan.scheme is None else sums(f"{plan.layer}.weight")) for plan in plans
    )


def _layer_report(plan: LayerPlan, sums: SquaredSums | None) -> LayerReport:
    words: dict[str, Any] = {
        "scheme": "float", "block_size": "channel", "symmetric": True,
        "group_size": 16, "channel_scale": False,
    }  # fmt: skip
    match plan.scheme:
        case AffineScheme(bits, block_size, symmetric):
            words |= {"scheme": f"int{bits}", "block_size": block_size or "channel", "symmetric": symmetric}
        case PaletteScheme(bits, group_size, channel_scale):
            words |= {"scheme": f"palette{bits}", "group_size": group_size, "channel_scale": channel_scale}
    return LayerReport(
        layer=plan.layer,
        shape=plan.shape,
        **words,
        solver=plan.solver,
        reason=plan.reason,
        stored_bits=plan.stored_bits,
        # Rounded, so that the last digits of a sum, which differ between processors, stay out of files.
        squared_sum=None if sums is None else float(f"{sums.signal:.6g}"),
        sqnr_db=None if sums is None or sums.noise == 0 else round(sums.sqnr_db, 2),
    )


@dataclass(frozen=True)
class ComponentReport:
    """The layers of one component, or all of them.

    Attributes:
        name: One of `weights.parts.PARTS`, or `total`.
        num_layers: Matrices and convolutions.
        num_weights: Their weights.
        stored_bytes: Bytes of them in a bundle, scales and zero points included.
        bits_per_weight: The same by weight, in bits.
        sqnr_db: Signal to noise of those that are integers, together; None without any, or where equal.
        schemes: How many are stored in each way: `int4 block 32` -> 28.
        in_float: Layers that were kept in float, and why (None where no rule asked for anything else).
        fitted: Layers that have smaller blocks or groups than their rule said, and why.
    """

    name: str
    num_layers: int
    num_weights: int
    stored_bytes: int
    bits_per_weight: float
    sqnr_db: float | None
    schemes: Mapping[str, int]
    in_float: Mapping[str, str | None]
    fitted: Mapping[str, str]


def component_reports(layers: Sequence[LayerReport]) -> tuple[ComponentReport, ...]:
    """One report for each component that has layers, then the total."""
    parts = {name: [r for r in layers if part_of(r.layer) == name] for name in PARTS}
    reports = [_component(name, part) for name, part in parts.items() if part]
    return (*reports, _component("total", layers))


def _component(name: str, layers: Sequence[LayerReport]) -> ComponentReport:
    schemes: dict[str, int] = {}
    for report in layers:
        schemes[scheme_text(report.quantized)] = schemes.get(scheme_text(report.quantized), 0) + 1
    num_weights = sum(report.size for report in layers)
    stored_bits = sum(report.stored_bits for report in layers)
    return ComponentReport(
        name=name,
        num_layers=len(layers),
        num_weights=num_weights,
        stored_bytes=ceil_div(stored_bits, 8),
        bits_per_weight=stored_bits / num_weights,
        sqnr_db=_joint_sqnr_db(layers),
        schemes=schemes,
        in_float={report.layer: report.reason for report in layers if report.quantized is None},
        fitted={r.layer: r.reason for r in layers if r.quantized is not None and r.reason is not None},
    )


def _joint_sqnr_db(layers: Sequence[LayerReport]) -> float | None:
    signal = noise = 0.0
    for report in layers:
        if report.squared_sum is not None:
            signal += report.squared_sum
            noise += 0 if report.sqnr_db is None else report.squared_sum * 10 ** (-report.sqnr_db / 10)
    return None if noise == 0 else round(float(10 * np.log10(signal / noise)), 2)


def scheme_text(scheme: Scheme | None) -> str:
    """A scheme in a few words: `int4 block 32`, `int8 channel, asymmetric`, `palette4 group 16`."""
    match scheme:
        case AffineScheme(bits, block_size, symmetric):
            blocks = "channel" if block_size is None else f"block {block_size}"
            return f"int{bits} {blocks}{'' if symmetric else ', asymmetric'}"
        case PaletteScheme(bits, group_size, channel_scale):
            return f"palette{bits} group {group_size}{', channel scale' if channel_scale else ''}"
        case _:
            return "float"
