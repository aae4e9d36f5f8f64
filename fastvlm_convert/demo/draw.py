"""Seeded random choices that never change between Python or numpy versions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Random choices built on `random.Random.random` alone, the one stream Python guarantees."""

    def __init__(self, seed: int) -> None:
        """Start the stream of one seed."""
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random() < probability

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self._random()

    def index(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(self._random() * count)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.index(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        pool = list(items)
        return [pool.pop(self.index(len(pool))) for _ in range(count)]
