"""Palettes: indices into small tables of float16 values, one table for some rows.

Without calibration a table is found by k-means on a line, which needs no distances: points are sorted once, a
cluster is a range of them, and its mean comes from prefix sums, so that a step of Lloyd's algorithm costs no
more than a binary search per value of the table. With a Hessian, GPTQ's error feedback (see `gptq`) rounds to
the table, and the table moves to where the compensated weights are (the first round of that is SqueezeLLM's
weighted k-means, arXiv:2306.07629).
"""

from dataclasses import dataclass, replace

import numpy as np

from fastvlm_convert.quantize.feedback import (
    PANEL,
    Factor,
    block_factor,
    factorize,
    feedback,
    importance_order,
    round_in_turn,
)
from fastvlm_convert.quantize.search import storable
from fastvlm_convert.weights.schemes import PaletteMatrix, PaletteScheme

LLOYD_STEPS = 40
SCALE_ROUNDS = 3
FEEDBACK_ROUNDS = 4
SWEEPS = 2
START_DENSITIES = (1.0, 1 / 3, 0.0)  # powers of the density: quantiles, the best for smooth ones, equal steps
HISTOGRAM = 256


def palettize(
    weight: np.ndarray,
    scheme: PaletteScheme,
    importance: np.ndarray | None = None,
    hessian: np.ndarray | None = None,
    *,
    damping: float = 0.01,
) -> PaletteMatrix:
    """Finds tables and indices.

    Args:
        weight: float32 [rows, columns].
        scheme: Bits, rows of a table, and whether every row has a scale.
        importance: Weight of every column's error, float32 [columns]; None weighs all alike.
        hessian: float64 [columns, columns]; replaces `importance`, and errors are fed back.
        damping: See `gptq`.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if hessian is None:
        return _cluster(
            weight, np.ones(weight.shape[1]) if importance is None else importance, scheme
        ).matrix()
    factor = factorize(hessian, importance_order(np.diag(hessian), 1), damping)
    return _with_feedback(weight, factor, scheme)


@dataclass(frozen=True)
class _Tables:
    """Tables and scales of a matrix, and the indices made with them.

    Attributes:
        scheme: How.
        palette: float32 [groups, levels], ascending, representable in float16.
        scale: float32 [rows], representable in float16; ones without a scale.
        indices: uint8 [rows, columns].
    """

    scheme: PaletteScheme
    palette: np.ndarray
    scale: np.ndarray
    indices: np.ndarray

    @property
    def group(self) -> np.ndarray:
        """The table of every row, int64 [rows]."""
        return np.arange(len(self.scale)) // self.scheme.group_size

    def values(self) -> np.ndarray:
        """float32 [rows, columns]."""
        return self.palette[self.group[:, None], self.indices] * self.scale[:, None]

    def matrix(self) -> PaletteMatrix:
        """What is stored."""
        scale = self.scale.astype(np.float16) if self.scheme.per_channel_scale else None
        return PaletteMatrix(self.scheme, self.indices, self.palette.astype(np.float16), scale)


def _cluster(weight: np.ndarray, importance: np.ndarray, scheme: PaletteScheme) -> _Tables:
    """Tables by k-means, in turn with the scales where there are any."""
    scale = np.ones(len(weight), np.float32)
    rounds = 1
    if scheme.per_channel_scale:
        scale, rounds = storable(np.abs(weight).max(1)), SCALE_ROUNDS
    tables = _tables(weight, importance, scale, scheme)
    for _ in range(1, rounds):
        values = tables.values() / tables.scale[:, None]
        norm = (values * values) @ importance
        scale = storable(
            np.where(norm > 0, (values * weight) @ importance / np.where(norm > 0, norm, 1), scale)
        )
        tables = _tables(weight, importance, scale, scheme)
    return tables


def _tables(weight: np.ndarray, importance: np.ndarray, scale: np.ndarray, scheme: PaletteScheme) -> _Tables:
    """The best table of every group for given scales, and the indices."""
    columns = weight.shape[1]
    palette = np.empty((scheme.num_groups(len(weight)), scheme.levels), np.float32)
    indices = np.empty(weight.shape, np.uint8)
    for group, table in enumerate(palette):
        rows = slice(group * scheme.group_size, (group + 1) * scheme.group_size)
        points = (weight[rows] / scale[rows, None]).reshape(-1)
        masses = (np.square(scale[rows], dtype=np.float64)[:, None] * importance).reshape(-1)
        table[:] = kmeans(points, masses, scheme.levels)
        indices[rows] = np.searchsorted(_borders(table), points).reshape(-1, columns)
    return _Tables(scheme, palette, scale, indices)


def kmeans(points: np.ndarray, masses: np.ndarray, count: int) -> np.ndarray:
    """The best of several weighted k-means on a line.

    Args:
        points: float32 [n].
        masses: Their weights, [n], not negative.
        count: Values wanted.

    Returns:
        float32 [count], ascending, representable in float16.
    """
    order = np.argsort(points, kind="stable")
    ordered = points[order].astype(np.float64)
    mass = masses[order].astype(np.float64)
    sums = np.zeros((3, len(points) + 1))
    np.cumsum([mass, mass * ordered, mass * ordered**2], axis=1, out=sums[:, 1:])
    fits = [_lloyd(start, ordered, sums) for start in _starts(ordered, mass, count)]
    return min(fits, key=lambda fit: fit[1])[0]


def _starts(ordered: np.ndarray, mass: np.ndarray, count: int) -> list[np.ndarray]:
    """First tables: quantiles of powers of the density of the points."""
    density, edges = np.histogram(ordered, HISTOGRAM, weights=mass)
    places = (np.arange(count) + 0.5) / count
    starts = []
    for power in START_DENSITIES:
        cumulated = np.concatenate([[0], np.cumsum(np.maximum(density, 0) ** power)])
        starts.append(np.interp(places * cumulated[-1], cumulated, edges))
    return starts


def _lloyd(values: np.ndarray, ordered: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, float]:
    """Lloyd's algorithm; the table in float16 and its squared error. Empty clusters keep their value."""
    for _ in range(LLOYD_STEPS):
        mass, first, _ = _cluster_sums(values, ordered, sums)
        moved = np.where(mass > 0, first / np.where(mass > 0, mass, 1), values)
        if np.array_equal(moved, values):
            break
        values = np.sort(moved)
    table = np.sort(values.astype(np.float16)).astype(np.float32)
    mass, first, second = _cluster_sums(table, ordered, sums)
    return table, float(np.sum(second - 2 * table * first + mass * table.astype(np.float64) ** 2))


def _cluster_sums(values: np.ndarray, ordered: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Mass, first and second moment of the points nearest to each value; float64 [3, count]."""
    ends = np.searchsorted(ordered, _borders(values))
    return np.diff(sums[:, np.concatenate([[0], ends, [len(ordered)]])])


def _borders(values: np.ndarray) -> np.ndarray:
    """Midpoints between neighbours of the last axis."""
    return (values[..., 1:] + values[..., :-1]) / 2


def _with_feedback(weight: np.ndarray, factor: Factor, scheme: PaletteScheme) -> PaletteMatrix:
    """Rounds with error feedback and moves the tables to the compensated weights; the best round wins.

    Scales stay those of the first clustering.
    """
    importance = np.empty(len(factor.order))
    importance[factor.order] = factor.variance
    tables = _cluster(weight, importance, scheme)
    best, least = tables, np.inf
    for _ in range(FEEDBACK_ROUNDS):
        wanted, error = _round(weight, factor, tables)
        left = wanted - (weight - error)
        cost = float(np.sum(np.square(left, dtype=np.float64) @ importance))
        rounded = replace(tables, indices=_indices_of(weight - error, tables))
        if cost < least:
            best, least = rounded, cost
        tables = _tables(wanted, importance, tables.scale, scheme)
    for _ in range(SWEEPS):
        best = _sweep(weight, factor, best)
    return best.matrix()


def _round(weight: np.ndarray, factor: Factor, tables: _Tables) -> tuple[np.ndarray, np.ndarray]:
    """Compensated weights that were rounded, and the errors made; float32 [rows, columns] each."""
    source = np.ascontiguousarray(weight.T[factor.order])
    error = round_in_turn(source, factor, lambda _, values: _nearest(values, tables))
    wanted = source + factor.unit.T @ error - error
    return _rows_first(wanted, factor), _rows_first(error, factor)


def _sweep(weight: np.ndarray, factor: Factor, tables: _Tables) -> _Tables:
    """Rounds panels anew while all others stay, where that lowers the exact error; tables stay."""
    source = weight.T[factor.order]
    error = np.ascontiguousarray(source - tables.values().T[factor.order])
    for start in range(0, len(source), PANEL):
        panel = slice(start, start + PANEL)
        matrix = factor.matrix[panel, panel]
        pull = np.linalg.solve(matrix.astype(np.float64), factor.matrix[panel] @ error).astype(np.float32)
        target = source[panel] - error[panel] + pull
        left = feedback(target, block_factor(matrix)[0], lambda _, values: _nearest(values, tables))
        better = np.sum(left * (matrix @ left), 0) < np.sum(pull * (matrix @ pull), 0)
        np.copyto(error[panel], source[panel] - (target - left), where=better)
    return replace(tables, indices=_indices_of(_rows_first(source - error, factor), tables))


def _rows_first(values: np.ndarray, factor: Factor) -> np.ndarray:
    """[columns in the factor's order, rows] -> [rows, columns as stored]."""
    stored = np.empty_like(values)
    stored[factor.order] = values
    return np.ascontiguousarray(stored.T)


def _nearest(values: np.ndarray, tables: _Tables) -> np.ndarray:
    """Rounds one weight of every row, float32 [rows]."""
    index = _search(_borders(tables.palette), tables.group, values / tables.scale)
    return tables.palette[tables.group, index] * tables.scale


def _indices_of(values: np.ndarray, tables: _Tables) -> np.ndarray:
    """Indices of the nearest values, uint8 [rows, columns]."""
    group = np.broadcast_to(tables.group[:, None], values.shape)
    return _search(_borders(tables.palette), group, values / tables.scale[:, None]).astype(np.uint8)


def _search(borders: np.ndarray, group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How many of its group's borders lie below each value; a binary search, all values at once."""
    index = np.zeros(values.shape, np.int64)
    half = (borders.shape[1] + 1) // 2
    while half:
        index += half * (values > borders[group, index + half - 1])
        half //= 2
    return index
