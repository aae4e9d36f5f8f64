"""Cross-layer equalization (arXiv:1906.04721): scale channels in one layer, and back in the next.

Exact where nothing but linear operations lies between two layers. In FastViTHD these are, in every block,
the 7 x 7 convolution and the first layer behind it, and in blocks with attention the norm before queries,
keys and values, and the values before the output projection (attention weighs rows, and does not mix
channels). Between all others lies the residual stream, or a GELU, which is not positively homogeneous. Scales
are powers of two, so not even a rounding changes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.weights.fold import scaled_rows
from fastvlm_convert.weights.source import Weight, WeightSource


@dataclass(frozen=True)
class Pair:
    """Two layers with the same channels between them.

    Attributes:
        first: Gives the channels: a convolution, a norm, or the last third of a stack of q, k and v.
        second: Reads them.
    """

    first: str
    second: str

    @property
    def first_rows(self) -> tuple[str, ...]:
        """Weights of `first` whose rows are the channels."""
        return (f"{self.first}.weight",) if self.is_stack else (f"{self.first}.weight", f"{self.first}.bias")

    @property
    def is_stack(self) -> bool:
        """Whether the channels are the last third of the rows of `first`."""
        return self.first.endswith(".qkv")


def pairs(names: Mapping[str, object]) -> Iterator[Pair]:
    """The pairs of an encoder whose weights have these canonical names, folded."""
    for name in names:
        block, matched, _ = name.partition(".ffn.fc1.weight")
        if matched:
            yield Pair(f"{block}.ffn.conv", f"{block}.ffn.fc1")
        block, matched, _ = name.partition(".attention.qkv.weight")
        if matched:
            yield Pair(f"{block}.norm", f"{block}.attention.qkv")
            yield Pair(f"{block}.attention.qkv", f"{block}.attention.proj")


def equalized(weights: WeightSource, exponents: Mapping[str, np.ndarray]) -> dict[str, Weight]:
    """A view in which channels between pairs are divided by powers of two.

    Args:
        weights: Canonical names, folded.
        exponents: Of the powers, int8 [channels], by the name of a pair's second layer.
    """
    changed = dict(weights)
    for pair in pairs(weights):
        if pair.second not in exponents:
            continue
        powers = np.exp2(exponents[pair.second].astype(np.float32))
        for name in pair.first_rows:
            rows = changed[name].shape[0]
            factors = np.concatenate([np.ones(rows - len(powers), np.float32), 1 / powers])
            changed[name] = scaled_rows(changed[name], lambda factors=factors: factors)  # type: ignore[misc]
        name = f"{pair.second}.weight"
        changed[name] = _scaled_inputs(changed[name], powers)
    return changed


def _scaled_inputs(weight: Weight, factors: np.ndarray) -> Weight:
    """A matrix or 1 x 1 convolution whose input channels are multiplied."""

    def read(start: int, stop: int) -> np.ndarray:
        return weight.read(start, stop) * factors.reshape(-1, *[1] * (len(weight.shape) - 2))

    return Weight(weight.shape, weight.dtype, read)
