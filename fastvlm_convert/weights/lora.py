"""Merge low-rank adapters into the weights they adapt: W + scale * B A (LoRA, arXiv:2106.09685).

A matrix product rounds as its library likes: by the shape it is given, the threads and the processor. Here a
number is the same whatever rows are read with it and wherever: products are added in the order of the ranks,
element by element, each operation rounded to float32.
"""

from dataclasses import dataclass

import numpy as np

from fastvlm_convert.weights.source import Weight

_BLOCK_BYTES = 1 << 18  # of the sum in work: what stays in a core's cache while the ranks pass over it


@dataclass(frozen=True)
class LowRank:
    """One adapter.

    Attributes:
        a: Down projection, [rank, in].
        b: Up projection, [out, rank].
        scale: Factor of the product, usually alpha / rank.
        transposed: The adapted weight is stored [in, out], as PEFT does for embeddings' adapters.
    """

    a: Weight
    b: Weight
    scale: float
    transposed: bool = False


def merge_low_rank(weight: Weight, adapter: LowRank) -> Weight:
    """`weight` plus its adapter, for the rows that are read."""

    def read(start: int, stop: int) -> np.ndarray:
        rows = weight.read(start, stop)
        if adapter.transposed:
            up, down = adapter.a.array()[:, start:stop].T, adapter.b.array().T
        else:
            up, down = adapter.b.read(start, stop), adapter.a.array()
        update = _product(up, down)
        update *= np.float32(adapter.scale)
        merged: np.ndarray = rows + update.reshape(rows.shape)
        return merged

    return Weight(weight.shape, weight.dtype, read)


def _product(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """float32 [rows, rank] times float32 [rank, columns], the ranks added one after the other."""
    total = np.empty((len(up), down.shape[1]), np.float32)
    step = max(1, _BLOCK_BYTES // (4 * down.shape[1]))
    for start in range(0, len(up), step):
        block, factors = total[start : start + step], up[start : start + step, :, None]
        np.multiply(factors[:, 0], down[0], out=block)
        term = np.empty_like(block)
        for rank in range(1, len(down)):
            np.multiply(factors[:, rank], down[rank], out=term)
            block += term
    return total
