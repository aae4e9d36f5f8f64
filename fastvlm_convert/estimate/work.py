"""What one call of a graph does: multiplications, and bytes that it reads and writes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a call does, or several calls one after the other.

    Attributes:
        macs: Multiply-accumulates of matrix products, convolutions and attention; an operation of one number
            at a time (a norm, an activation, a sum) counts none.
        weight_bytes: Stored bytes of the weights that it multiplies or adds with, each counted once a call.
        row_bytes: Stored bytes of the rows that it looks up: of the embedding and of rotary tables.
        cache_bytes: Bytes of keys and values that it reads and writes.
        activation_bytes: Bytes of what its operations write.
        peak_bytes: Most bytes of such results that are needed at a time, with operations in the file's order.
        made_bytes: Bytes of weights that a runtime makes of stored ones when it loads the graph.
    """

    macs: int = 0
    weight_bytes: int = 0
    row_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0
    peak_bytes: int = 0
    made_bytes: int = 0

    @property
    def read_bytes(self) -> int:
        """What has to come from memory however well operations are fused: all but what they write."""
        return self.weight_bytes + self.row_bytes + self.cache_bytes

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(
            self.macs + other.macs,
            self.weight_bytes + other.weight_bytes,
            self.row_bytes + other.row_bytes,
            self.cache_bytes + other.cache_bytes,
            self.activation_bytes + other.activation_bytes,
            max(self.peak_bytes, other.peak_bytes),
            self.made_bytes + other.made_bytes,
        )


def most_alive(writes: Iterable[tuple[str, int, tuple[str, ...]]], kept: Mapping[str, int]) -> int:
    """Most bytes that are needed at a time.

    Args:
        writes: For each operation in order: its result, that result's bytes, and the results it reads.
        kept: Results that stand before the first operation, with their bytes.
    """
    steps = list(writes)
    last = {name: place for place, (_, _, reads) in enumerate(steps) for name in reads}
    alive = dict(kept)
    now = most = sum(alive.values())
    for place, (name, size, reads) in enumerate(steps):
        now += size - alive.get(name, 0)
        alive[name] = size
        most = max(most, now)
        for read in {*reads, name}:
            if last.get(read, place) <= place:
                now -= alive.pop(read, 0)
    return most
