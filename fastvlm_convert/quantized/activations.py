"""Activations as integers: how a layer's input and output are rounded, and which layers can."""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineScheme
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.parts import part_of

ActivationBits = Literal[8, 16]

STAGE: Final = "activation ranges"  # of a conversion, as progress has it
# Of a step: what two correct computations make of equal activations differs by less.
FLOAT32_TIE: Final = 1 / 64
FLOAT16_TIE: Final = 1 / 4
WEIGHTS: Final = AffineScheme(8, None, symmetric=True)  # what integer kernels multiply activations with


@dataclass(frozen=True)
class TensorScale:
    """One scale for all values: `q = clamp(round(x / scale) + zero_point, 0, 2^bits - 1)`, half to even.

    Attributes:
        bits: Of the unsigned integers.
        scale: A float32; of 8 bits one that float16 holds.
        zero_point: The integer that stands for zero.
    """

    bits: ActivationBits
    scale: float
    zero_point: int

    @property
    def dtype(self) -> str:
        """Of the integers."""
        return f"uint{self.bits}"

    @property
    def levels(self) -> int:
        """Number of integers."""
        return 1 << self.bits


@dataclass(frozen=True)
class LayerScales:
    """What a layer multiplies, and gives.

    Attributes:
        input: Of what it reads.
        output: Of what it gives; None where it gives floats, as linear layers do.
    """

    input: TensorScale
    output: TensorScale | None

    def bias_scale(self, weight_scale: np.ndarray) -> np.ndarray:
        """Scale of the products, and so of a bias among them; float32 [rows], of float16 [rows, 1]."""
        scales: np.ndarray = np.float32(self.input.scale) * weight_scale.astype(np.float32)[:, 0]
        return scales


def bits_of(recipe: Recipe) -> ActivationBits | None:
    """Bits of the encoder's activations; None where they are floats."""
    bits: dict[str, ActivationBits] = {"int8": 8, "int16": 16}
    return bits.get(recipe.vision.activations)


def unquantizable(plan: LayerPlan) -> str | None:
    """Why a layer of encoder or projector multiplies floats whatever was measured; None where it need not."""
    if ".se." in plan.layer:
        return "it reads one value of each channel"
    if plan.scheme is None:
        return "its weights are floats"
    if plan.scheme != WEIGHTS:
        return "its weights are not symmetric int8 per channel"
    if plan.solver != "search":
        return "its weights are solved for float inputs"
    return None


def is_depthwise(plan: LayerPlan) -> bool:
    """Whether a layer reads one channel for each that it gives.

    Such layers do few of the multiplications, their channels need scales of their own, and ONNX Runtime is
    faster with floats there.
    """
    return len(plan.shape) == 4 and plan.shape[1] == 1


def is_in_encoder(layer: str) -> bool:
    """Whether a layer works on images: those of encoder and projector."""
    return part_of(layer) in ("vision", "projector")


def gives_floats(plan: LayerPlan) -> bool:
    """Whether a layer's products are not rounded again: linear layers add their bias in float."""
    return len(plan.shape) == 2
