"""Merge low-rank adapters into the weights they adapt: W + scale * B A (LoRA, arXiv:2106.09685)."""

from dataclasses import dataclass

import numpy as np

from fastvlm_convert.weights.source import Weight


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
    """`weight` plus its adapter, computed in float32 for the rows that are read."""

    def read(start: int, stop: int) -> np.ndarray:
        rows = weight.read(start, stop)
        if adapter.transposed:
            update = adapter.a.array()[:, start:stop].T @ adapter.b.array().T
        else:
            update = adapter.b.read(start, stop) @ adapter.a.array()
        merged: np.ndarray = rows + np.float32(adapter.scale) * update.reshape(rows.shape)
        return merged

    return Weight(weight.shape, weight.dtype, read)
