"""Do prompts that are read in two chunks have the bits of those that are read at once?

    python -m benchmarks.chunked_prefill BUNDLE... [--threads 1 2] [--lengths 48 65 128] [--chunks 30 31 64]

One row a bundle and number of threads: of all pairs of a prompt's length and a first chunk, how many differ
in any logit or cached value, apart for first chunks of even and odd length and for a last chunk of one token,
and by how much at most. `run`, `chat` and `serve` read every prompt in the same chunks, so that their answers
are equal whatever this prints; it says how far they are from clients that read a prompt at once.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.runtime.onnx_session import OnnxSequence

LENGTHS: Final = (2, 3, 8, 17, 32, 33, 48, 53, 64, 65, 100, 128, 129, 200, 257, 300, 400)
CHUNKS: Final = (1, 2, 3, 7, 8, 16, 30, 31, 32, 64, 100, 127, 128, 270, 271)


@dataclass
class Tally:
    """Pairs of one kind.

    Attributes:
        pairs: How many there are.
        different: Where bits differ: length, first chunk, most that a logit and a cached value differ.
    """

    pairs: int = 0
    different: list[tuple[int, int, float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        """For a cell of the table."""
        if not self.different:
            return f"0 of {self.pairs}"
        logits, values = (max(row[i] for row in self.different) for i in (2, 3))
        where = ", ".join(f"{length}:{chunk}" for length, chunk, *_ in self.different[:4])
        return f"{len(self.different)} of {self.pairs}, logits {logits:.2g}, cache {values:.2g} ({where})"


def compare(session: OnnxSequence, lengths: Iterable[int], chunks: Iterable[int]) -> dict[str, Tally]:
    """Tallies by kind of pair."""
    rng = np.random.default_rng(0)
    tallies = {"even": Tally(), "odd": Tally(), "last of one token": Tally()}
    for length in lengths:
        embeds = session.embed(rng.integers(0, 256, length))
        logits = session.prefill(embeds)
        cached = session.copy_prefix(length)
        for chunk in (*(c for c in chunks if c < length - 1), length - 1):
            session.prefill(embeds[:chunk])
            again = session.append(embeds[chunk:])
            kind = "last of one token" if chunk == length - 1 else "odd" if chunk % 2 else "even"
            tallies[kind].pairs += 1
            pairs = zip(cached.values, session.copy_prefix(length).values, strict=True)
            values = max(float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max()) for a, b in pairs)
            most = float(np.abs(logits - again).max())
            if values or most:
                tallies[kind].different.append((length, chunk, most, values))
    return tallies


def main() -> None:
    """Print one row per bundle and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS)
    arguments = parser.parse_args()
    print("| bundle | threads | first chunk even | first chunk odd | last chunk of one token |")
    print("|---|---|---|---|---|")
    for bundle in arguments.bundles:
        for threads in arguments.threads:
            session = load_bundle(bundle, "onnx", threads=threads, spinning=False).session
            assert isinstance(session, OnnxSequence)
            tallies = compare(session, arguments.lengths, arguments.chunks)
            cells = " | ".join(map(str, tallies.values()))
            print(f"| {bundle.resolve().name} | {threads} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
