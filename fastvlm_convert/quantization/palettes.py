"""Palettes: indices into small tables of float16 values, one table for some rows.

Without calibration a table is found by k-means (see `clustering`), in turn with the scales of the rows. With
a Hessian, weights are rounded to the table with error compensation (see `gptq`), and the table moves to where
the compensated weights are (the first round is SqueezeLLM's weighted k-means, arXiv:2306.07629).
"""

from dataclasses import dataclass, replace

import numpy as np

from fastvlm_convert.quantization.candidates import storable
from fastvlm_convert.quantization.clustering import kmeans
from fastvlm_convert.quantization.error_compensation import (
    PANEL,
    Factor,
    block_factor,
    factorize,
    importance_order,
    panel_pull,
    round_by_panels,
    round_columns,
)
from fastvlm_convert.quantized.schemes import PaletteMatrix, PaletteScheme

CHUNK = 1 << 21  # weights clustered at a time, whole groups
SCALE_ROUNDS = 3
COMPENSATION_ROUNDS = 4
SWEEPS = 2


def palettize(
    weight: np.ndarray,
    scheme: PaletteScheme,
    importance: np.ndarray | None = None,
    hessian: np.ndarray | None = None,
    *,
    damping: float = 0.01,
) -> PaletteMatrix:
    """Find tables and indices.

    Without a Hessian, groups of rows do not depend on each other, to the last bit.

    Args:
        weight: float32 [rows, columns].
        scheme: Bits, rows of a table, and whether every row has a scale.
        importance: Weight of every column's error, float32 [columns]; None for equal weights.
        hessian: float64 [columns, columns]; replaces `importance`, and later columns make up for errors.
        damping: See `gptq`.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if hessian is not None:
        factor = factorize(hessian, importance_order(np.diag(hessian), 1), damping)
        return _compensated(weight, factor, scheme)
    rows, columns = weight.shape
    masses = np.ones(columns) if importance is None else np.asarray(importance, np.float64)
    step = max(1, CHUNK // (columns * scheme.group_size)) * scheme.group_size
    return PaletteMatrix.joined(
        [_cluster(weight[row : row + step], masses, scheme).matrix() for row in range(0, rows, step)]
    )


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
    if not scheme.per_channel_scale:
        return _tables(weight, importance, np.ones(len(weight), np.float32), scheme)
    tables = _tables(weight, importance, storable(np.abs(weight).max(1)), scheme)
    for _ in range(1, SCALE_ROUNDS):
        values = tables.palette[tables.group[:, None], tables.indices]
        norm, overlap = (np.sum(values * other * importance, axis=1) for other in (values, weight))
        fitted = np.where(norm > 0, overlap / np.where(norm > 0, norm, 1), tables.scale)
        tables = _tables(weight, importance, storable(fitted), scheme, tables.palette)
    return tables


def _tables(
    weight: np.ndarray,
    importance: np.ndarray,
    scale: np.ndarray,
    scheme: PaletteScheme,
    start: np.ndarray | None = None,
) -> _Tables:
    """The best table of every group for given scales, and the indices; `start` has tables to begin with."""
    rows, columns = weight.shape
    points = weight / scale[:, None]
    masses = np.square(scale, dtype=np.float64)[:, None] * importance
    palette = np.empty((scheme.num_groups(rows), scheme.levels), np.float32)
    indices = np.empty(weight.shape, np.uint8)
    whole = rows // scheme.group_size  # the last group may be smaller
    for groups, part in (
        (slice(whole), slice(whole * scheme.group_size)),
        (slice(whole, None), slice(whole * scheme.group_size, None)),
    ):
        if len(palette[groups]):
            lines = (len(palette[groups]), -1)
            palette[groups], found = kmeans(
                points[part].reshape(lines),
                masses[part].reshape(lines),
                scheme.levels,
                None if start is None else start[groups],
            )
            indices[part] = found.reshape(-1, columns)
    return _Tables(scheme, palette, scale, indices)


def _compensated(weight: np.ndarray, factor: Factor, scheme: PaletteScheme) -> PaletteMatrix:
    """Round with error compensation and move the tables to the compensated weights; the best round wins.

    Scales stay those of the first clustering.
    """
    importance = np.empty(len(factor.order))
    importance[factor.order] = factor.variance
    tables = _cluster(weight, importance, scheme)
    best, least = tables, np.inf
    for _ in range(COMPENSATION_ROUNDS):
        wanted, error = _round(weight, factor, tables)
        left = wanted - (weight - error)
        cost = float(np.sum(np.square(left, dtype=np.float64) @ importance))
        if cost < least:
            best, least = _Rounder.of(tables).rounded(weight - error), cost
        tables = _tables(wanted, importance, tables.scale, scheme)
    for _ in range(SWEEPS):
        best = _sweep(weight, factor, best)
    return best.matrix()


def _round(weight: np.ndarray, factor: Factor, tables: _Tables) -> tuple[np.ndarray, np.ndarray]:
    """The compensated weights that were rounded, and the errors made; float32 [rows, columns] each."""
    source = np.ascontiguousarray(weight.T[factor.order])
    error = round_by_panels(source, factor, _Rounder.of(tables).nearest)
    wanted = source + factor.unit.T @ error - error
    return _rows_first(wanted, factor), _rows_first(error, factor)


def _sweep(weight: np.ndarray, factor: Factor, tables: _Tables) -> _Tables:
    """Round panels anew while all else stays, in the rows where that lowers the exact error."""
    rounder = _Rounder.of(tables)
    source = weight.T[factor.order]
    error = np.ascontiguousarray(source - tables.values().T[factor.order])
    for start in range(0, len(source), PANEL):
        panel = slice(start, start + PANEL)
        matrix = factor.matrix[panel, panel]
        pull = panel_pull(error, factor, panel)
        target = source[panel] - error[panel] + pull
        left = round_columns(target, block_factor(matrix)[0], rounder.nearest)
        better = np.sum(left * (matrix @ left), 0) < np.sum(pull * (matrix @ pull), 0)
        np.copyto(error[panel], source[panel] - (target - left), where=better)
    return rounder.rounded(_rows_first(source - error, factor))


def _rows_first(values: np.ndarray, factor: Factor) -> np.ndarray:
    """[columns in the factor's order, rows] -> [rows, columns as stored]."""
    stored = np.empty_like(values)
    stored[factor.order] = values
    return np.ascontiguousarray(stored.T)


@dataclass(frozen=True)
class _Rounder:
    """Rounds weights to the tables of their rows.

    Attributes:
        tables: The tables and scales; its indices do not matter.
        borders: Midpoints between neighbors, infinity after a table's last, float32 [groups * levels].
        first: Place of the first value of every row's table, int64 [rows].
    """

    tables: _Tables
    borders: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, tables: _Tables) -> "_Rounder":
        """A rounder to these tables."""
        borders = np.full(tables.palette.shape, np.inf, np.float32)
        borders[:, :-1] = (tables.palette[:, 1:] + tables.palette[:, :-1]) / 2
        return cls(tables, borders.reshape(-1), tables.group * tables.scheme.levels)

    def nearest(self, _: int, values: np.ndarray) -> np.ndarray:
        """The nearest values to one weight of every row, float32 [rows]."""
        places = self._places(values, self.tables.scale, self.first)
        return self.tables.palette.reshape(-1)[places] * self.tables.scale

    def rounded(self, values: np.ndarray) -> _Tables:
        """The tables with the indices of the values nearest to [rows, columns]."""
        first = self.first[:, None]
        places = self._places(values, self.tables.scale[:, None], first)
        return replace(self.tables, indices=(places - first).astype(np.uint8))

    def _places(self, values: np.ndarray, scale: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Places in all tables, by a binary search for all values at once."""
        points = values / scale
        places = np.broadcast_to(first, values.shape).copy()
        half = self.tables.scheme.levels // 2
        while half:
            places += half * (points > self.borders[places + (half - 1)])
            half //= 2
        return places
