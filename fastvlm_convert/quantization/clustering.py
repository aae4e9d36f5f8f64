"""Weighted k-means of numbers, many lines of them at once.

On a line a cluster is a range, so a step of Lloyd's algorithm needs only the sums of mass and of mass times
value up to every border. They come from a fine histogram of each line, with narrow bins near zero, where
weights are densest; a step then costs a look-up for each value of a table, however many points there are. The
last steps are exact: they look at every point.

Example: the points (-3, -1, 3, 5) of mass 1 and a table (-2, 2). The border is 0; up to it the mass is 2 and
the sum -4, up to the end they are 4 and 4. So the clusters have the masses (2, 2) and the sums (-4, 8), and
the table moves to (-2, 4).
"""

from dataclasses import dataclass

import numpy as np

BINS_A_VALUE = 32  # bins a line for each value of its table, or fewer where points are few
BINS_A_POINT = 4
MAX_STEPS = 40
EXACT_STEPS = 2
START_BINS = 256
NUM_STARTS = 3
WORKING_SET = 1 << 19  # points, or bins, in work at a time

Clusters = tuple[np.ndarray, np.ndarray]
"""Tables, float32 [lines, count], ascending and representable in float16; and the index of the value nearest
to each point, uint8 [lines, points]."""


def kmeans(points: np.ndarray, masses: np.ndarray, count: int, start: np.ndarray | None = None) -> Clusters:
    """Find the tables of values nearest to the points of each line; no line depends on another.

    Args:
        points: float32 [lines, points].
        masses: Their weights, not negative, float64 [lines, points].
        count: Values of a table, at most 256.
        start: Tables to begin with, float32 [lines, count]; None tries several and takes the best.
    """
    lines, size = points.shape
    tables = np.empty((lines, count), np.float32)
    indices = np.empty((lines, size), np.uint8)
    bins = START_BINS * max(1, min(count * BINS_A_VALUE, size * BINS_A_POINT) // START_BINS)
    step = max(1, WORKING_SET // max(size, bins))
    for first in range(0, lines, step):
        part = slice(first, first + step)
        work = _Lines.of(points[part], masses[part], count, bins)
        if size <= count:
            found = work.own_values()
        else:
            found = work.search(work.starts() if start is None else start[part][None])
        tables[part], indices[part] = work.rounded(found)
    return tables, indices


@dataclass(frozen=True)
class _Bins:
    """Bins of every line; x is in bin `size / 2 (1 + sign(x) sqrt(|x| / largest))`, rounded down.

    Attributes:
        size: Bins a line.
        factor: `size / 2 / sqrt(largest)`, float32 [lines, 1].
    """

    size: int
    factor: np.ndarray

    @classmethod
    def of(cls, points: np.ndarray, size: int) -> "_Bins":
        """`size` bins for the points of each line."""
        largest = np.maximum(np.maximum(points.max(1), -points.min(1)), np.finfo(np.float32).tiny)
        return cls(size, (np.float32(size // 2 - 1) / np.sqrt(largest))[:, None])

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values [..., lines, n] lie, float32 0..size; larger values never lie lower."""
        roots = np.sqrt(np.abs(values, dtype=np.float32))
        np.copysign(roots, values, out=roots)
        roots *= self.factor
        roots += np.float32(self.size // 2)
        return roots

    def value(self, places: np.ndarray) -> np.ndarray:
        """The values at some places [n] of every line, float32 [lines, n]."""
        roots = (places - np.float32(self.size // 2)) / self.factor
        return roots * np.abs(roots)

    def number(self, values: np.ndarray) -> np.ndarray:
        """The bin of each value [lines, n], counted through all lines; int64."""
        numbers = self.place(values).astype(np.int64)
        np.clip(numbers, 0, self.size - 1, out=numbers)
        numbers += np.arange(len(self.factor))[:, None] * self.size
        return numbers


@dataclass(frozen=True)
class _Lines:
    """Some lines of points, whose tables are wanted.

    Attributes:
        count: Values of a table.
        points: float32 [lines, points].
        masses: float64 [lines, points].
        weighted: Masses times points, float64 [lines, points].
        bins: Their bins.
        numbers: The bin of each point, counted through all lines; int64 [lines, points].
        mass: Sum of masses below each edge of a bin, float64 [lines, bins + 1].
        first: Sum of masses times points below each edge, float64 [lines, bins + 1].
    """

    count: int
    points: np.ndarray
    masses: np.ndarray
    weighted: np.ndarray
    bins: _Bins
    numbers: np.ndarray
    mass: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, points: np.ndarray, masses: np.ndarray, count: int, num_bins: int) -> "_Lines":
        """Sort points into bins."""
        bins = _Bins.of(points, num_bins)
        numbers = bins.number(points)
        weighted = masses * points
        mass, first = (_cumulated(numbers, values, bins.size) for values in (masses, weighted))
        return cls(count, points, masses, weighted, bins, numbers, mass, first)

    def own_values(self) -> np.ndarray:
        """Tables of the points themselves, where a table has room for all; float32 [lines, count]."""
        return np.pad(np.sort(self.points), ((0, 0), (0, self.count - self.points.shape[1])), "edge")

    def search(self, starts: np.ndarray) -> np.ndarray:
        """The best of the tables that Lloyd's algorithm makes of [starts, lines, count]; float32."""
        tables = self._best(self._lloyd(starts.astype(np.float64))).astype(np.float32)
        for _ in range(EXACT_STEPS):
            clusters = self._nearest(tables) + np.arange(len(tables))[:, None] * self.count
            mass, first = (
                np.bincount(clusters.reshape(-1), values.reshape(-1), tables.size).reshape(tables.shape)
                for values in (self.masses, self.weighted)
            )
            tables = np.sort(_means(mass, first, tables).astype(np.float32))
        return tables

    def rounded(self, tables: np.ndarray) -> Clusters:
        """The tables as float16 holds them, and the indices with these."""
        tables = tables.astype(np.float16).astype(np.float32)
        return tables, self._nearest(tables).astype(np.uint8)

    def starts(self) -> np.ndarray:
        """First tables: quantiles of powers of the density of the points, float64 [starts, lines, count].

        The powers are 1 (the points' own quantiles), 1/3 (the best for smooth densities) and 0 (equal steps).
        """
        lines = len(self.points)
        low, high = self.points.min(1)[:, None], self.points.max(1)[:, None]
        kept = np.arange(0, self.bins.size + 1, self.bins.size // START_BINS)
        edges = np.clip(self.bins.value(kept.astype(np.float32)), low, high).astype(np.float64)
        widths, mass = np.diff(edges), np.maximum(np.diff(self.mass[:, kept]), 0)
        shares = (np.arange(self.count) + 0.5) / self.count
        starts = np.empty((NUM_STARTS, lines, self.count))
        densities = (mass, _cube_root(mass * widths * widths), widths)  # each times the widths
        for start, density in zip(starts, densities, strict=True):
            below = np.zeros(edges.shape)
            np.cumsum(density, axis=1, out=below[:, 1:])
            for line in range(lines):
                start[line] = np.interp(shares * below[line, -1], below[line], edges[line])
        return starts

    def _lloyd(self, tables: np.ndarray) -> np.ndarray:
        """Move values to the centers of their clusters until they stay; float64 [starts, lines, count]."""
        for _ in range(MAX_STEPS):
            moved = np.sort(_means(*self._clusters(tables), tables))
            if np.array_equal(moved, tables):
                break
            tables = moved
        return tables

    def _best(self, tables: np.ndarray) -> np.ndarray:
        """The table of each line with the smallest squared error, float64 [lines, count]."""
        mass, first = self._clusters(tables)
        error = np.sum(tables * (tables * mass - 2 * first), -1)  # without the points' own squares
        return tables[error.argmin(0), np.arange(tables.shape[1])]

    def _clusters(self, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mass and first moment of the clusters of tables [starts, lines, count]; of their shape each.

        A bin that a border cuts counts on both sides, as if its points were spread evenly: of bins with the
        masses (2, 4, 6), a border in the middle of the third has 2 + 4 + 6 / 2 = 9 below it.
        """
        starts, lines, count = tables.shape
        ends = np.zeros((starts, lines, count + 1))
        ends[..., -1] = self.bins.size
        ends[..., 1:-1] = self.bins.place(_borders(tables))
        edge = np.clip(ends.astype(np.int64), 0, self.bins.size - 1)
        share = ends - edge
        edge += np.arange(lines)[:, None] * (self.bins.size + 1)

        def between(sums: np.ndarray) -> np.ndarray:
            below, above = sums.reshape(-1)[edge], sums.reshape(-1)[edge + 1]
            return np.diff(below + share * (above - below))

        return between(self.mass), between(self.first)

    def _nearest(self, tables: np.ndarray) -> np.ndarray:
        """How many borders of its line's table lie below each point, int64 [lines, points].

        That is the index of the nearest value. Borders in lower bins are counted once for each bin; those in
        the point's own bin are found by a binary search that all points do at once.

        Example: a table (-3, -0.2, 0.1, 0.3) has the borders (-1.6, -0.05, 0.2), the last two in one bin with
        the point 0.15. One border lies in a lower bin, so the search starts at place 1, where two borders are
        left: 0.15 > 0.2 is false, 0.15 > -0.05 is true. That makes 2, and value 2 is 0.1.
        """
        lines, count = tables.shape
        borders = _borders(tables)
        inside = np.bincount(self.bins.number(borders).reshape(-1), minlength=lines * self.bins.size)
        inside = inside.reshape(lines, -1)
        below = np.cumsum(inside, axis=1) - inside
        stride = 2 * count  # a comparison beyond the last border meets infinity
        padded = np.full((lines, stride), np.inf, np.float32)
        padded[:, : count - 1] = borders
        flat, line_start = padded.reshape(-1), np.arange(lines)[:, None] * stride
        place = (below + line_start).reshape(-1)[self.numbers]
        half = 1 << (int(inside.max()).bit_length() - 1)  # enough steps for the fullest bin
        while half:
            place += half * (self.points > flat[place + (half - 1)])
            half //= 2
        return place - line_start


def _cumulated(numbers: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Sums of the values below each edge of the bins, float64 [lines, size + 1]."""
    lines = len(numbers)
    sums = np.zeros((lines, size + 1))
    histogram = np.bincount(numbers.reshape(-1), values.reshape(-1), lines * size)
    np.cumsum(histogram.reshape(lines, size), axis=1, out=sums[:, 1:])
    return sums


def _cube_root(values: np.ndarray) -> np.ndarray:
    """Roots of numbers that are not negative; only basic arithmetic, which is the same on all processors."""
    mantissa, exponent = np.frexp(values)
    third = (exponent + 2) // 3
    wanted = np.ldexp(mantissa, exponent - 3 * third)  # 1/8 .. 1, or 0
    root = 0.4 + 0.6 * wanted
    for _ in range(6):  # Newton's method: errors, at first below 1/6, are squared each time
        root -= (root * root * root - wanted) / (3 * root * root)
    return np.where(values > 0, np.ldexp(root, third), 0)


def _means(mass: np.ndarray, first: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Centers of clusters; the old values where there is no mass."""
    return np.where(mass > 0, first / np.where(mass > 0, mass, 1), old)


def _borders(tables: np.ndarray) -> np.ndarray:
    """Midpoints between neighbors on the last axis."""
    return (tables[..., 1:] + tables[..., :-1]) / 2
