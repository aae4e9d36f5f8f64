"""Merge adapters into the weights they adapt: W + scale * B A (LoRA, arXiv:2106.09685), or rows of a table.

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
        up: B, [rows of the weight, rank].
        down: A, [rank, ...] with all axes of the weight but the first.
        scale: Factor of the product, usually alpha / rank.
    """

    up: Weight
    down: Weight
    scale: float


def merge_low_rank(weight: Weight, adapter: LowRank) -> Weight:
    """`weight` plus its adapter, for the rows that are read."""

    def read(start: int, stop: int) -> np.ndarray:
        rows = weight.read(start, stop)
        down = adapter.down.array()
        update = _product(adapter.up.read(start, stop), down.reshape(len(down), -1))
        update *= np.float32(adapter.scale)
        merged: np.ndarray = rows + update.reshape(rows.shape)
        return merged

    return Weight(weight.shape, weight.dtype, read)


def replace_rows(weight: Weight, numbers: tuple[int, ...], rows: Weight) -> Weight:
    """`weight` with some rows replaced, and longer where they lie beyond its end.

    Args:
        weight: A matrix.
        numbers: Which rows, each once; all between the weight's end and the new one's.
        rows: What they become, [numbers, columns].
    """
    count = max(weight.shape[0], *(number + 1 for number in numbers))

    def read(start: int, stop: int) -> np.ndarray:
        changed = np.empty((stop - start, *weight.shape[1:]), np.float32)
        kept = min(stop, weight.shape[0])
        if start < kept:
            changed[: kept - start] = weight.read(start, kept)
        values = rows.array()
        for place, number in enumerate(numbers):
            if start <= number < stop:
                changed[number - start] = values[place]
        return changed

    return Weight((count, *weight.shape[1:]), weight.dtype, read)


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
