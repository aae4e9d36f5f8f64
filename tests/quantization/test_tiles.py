"""Tiles that were solved once are read back: by any rows, whoever asks, and never when they are damaged."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantization.tiles import SMALLEST, TILE, by_tiles
from fastvlm_convert.quantized.codec import affine_matrix, matrix_tensors
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme, PaletteScheme, QuantizedMatrix
from fastvlm_convert.user_cache import without_cache
from fastvlm_convert.weights.source import Weight
from tests.quantization.layers import weights

INT4 = AffineScheme(4, 32, symmetric=False)
INT8 = AffineScheme(8, None, symmetric=True)
PALETTE = PaletteScheme(4, 16, per_channel_scale=True)
COLUMNS = 4096
ROWS = 2 * TILE // COLUMNS + 100  # two tiles and a piece


@dataclass
class Solver:
    """Plain rounding of a layer, which counts the rows that it is given; `search` would take seconds here."""

    scheme: AffineScheme = INT4
    values: np.ndarray = field(default_factory=lambda: weights(5, ROWS, COLUMNS))
    solved: int = 0

    def solve(self, matrix: np.ndarray) -> AffineMatrix:
        self.solved += len(matrix)
        scale = np.float16(np.abs(matrix).max() / 7)
        blocks = (len(matrix), self.scheme.num_blocks(matrix.shape[1]))
        q = np.clip(np.rint(matrix / np.float32(scale)) + 8, 0, 15).astype(np.uint8)
        return AffineMatrix(self.scheme, q, np.full(blocks, scale), np.full(blocks, 8, np.uint8))

    def read(self, start: int, stop: int) -> AffineMatrix:
        """Rows as somebody else would ask for them, who knows nothing of earlier calls."""
        weight = Weight(self.values.shape, "float32", lambda first, last: self.values[first:last])
        restore = partial(affine_matrix, scheme=self.scheme, columns=self.values.shape[1])
        return by_tiles(weight, self.scheme, self.solve, restore)(start, stop)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiles(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.bin"))


def same(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    ours, theirs = matrix_tensors(a), matrix_tensors(b)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)


def test_a_layer_is_solved_once_whatever_rows_are_asked_for(own_cache):
    solver = Solver()
    whole = solver.read(0, ROWS)
    assert (solver.solved, len(tiles(own_cache))) == (ROWS, 3)
    for start, stop in ((0, ROWS), (3, 47), (200, 300), (ROWS - 50, ROWS), (100, ROWS)):
        assert same(solver.read(start, stop), whole.read(start, stop)), (start, stop)
    assert solver.solved == ROWS


def test_a_few_rows_alone_are_solved_alone(own_cache):
    solver = Solver()
    solver.read(7, 9)
    assert (solver.solved, tiles(own_cache)) == (2, [])


def test_rows_at_the_edges_of_pieces_are_solved_once_too(own_cache):
    solver = Solver()
    for start in range(0, ROWS, 60):
        solver.read(start, min(start + 60, ROWS))
    assert ROWS <= solver.solved < ROWS + 2 * TILE // COLUMNS // 16


@pytest.mark.parametrize("change", ["floats", "scheme", "shape"])
def test_other_content_is_solved_anew(own_cache, change):
    first = Solver()
    first.read(0, 20)
    match change:
        case "floats":
            values = first.values.copy()
            values[0, 0] += 1e-6
            other = Solver(values=values)
        case "scheme":
            other = Solver(scheme=AffineScheme(4, 64, symmetric=False))
        case "shape":
            other = Solver(values=first.values[: TILE // COLUMNS].reshape(-1, 2 * COLUMNS))
    other.read(0, 20)
    assert other.solved > 0
    assert len(tiles(own_cache)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: bytes(len(raw)),
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
    ],
)
def test_a_damaged_tile_is_solved_again(own_cache, damage):
    solver = Solver()
    expected = solver.read(0, 20)
    (path,) = tiles(own_cache)
    whole, before = path.read_bytes(), solver.solved
    path.write_bytes(damage(whole))
    assert same(solver.read(0, 20), expected)
    assert solver.solved == 2 * before
    assert path.read_bytes() == whole


@pytest.mark.parametrize("obstacle", ["file", "folder in its place", "link"])
def test_where_nothing_can_be_kept_it_is_solved_all_the_same(own_cache, obstacle, tmp_path):
    solver = Solver()
    expected = solver.read(0, 20)
    (path,) = tiles(own_cache)
    path.unlink()
    match obstacle:
        case "file":
            path.parent.rmdir()
            path.parent.touch()
        case "folder in its place":
            path.mkdir()
        case "link":
            path.symlink_to(tmp_path / "nothing" / "here")
    before = solver.solved
    assert same(solver.read(0, 20), expected)
    assert solver.solved == 2 * before
    assert not (tmp_path / "nothing").exists()


def test_without_the_cache_it_is_neither_read_nor_written(own_cache):
    solver = Solver()
    with without_cache():
        solver.read(0, 20)
    assert (solver.solved, tiles(own_cache)) == (20, [])
    solver.read(0, 20)
    before = solver.solved
    with without_cache():
        solver.read(0, 20)
    assert solver.solved == before + 20


def test_what_is_read_back_is_what_was_found(own_cache):
    rows = 2 * SMALLEST // 1024
    values = weights(8, rows, 1024)
    for scheme, solve in ((INT4, quantize_affine), (INT8, quantize_affine), (PALETTE, palettize)):
        plan = LayerPlan("layer", values.shape, scheme, "search", None, 0)
        source = {"layer.weight": Weight(values.shape, "float32", lambda first, last: values[first:last])}
        found = [quantize_weights(source, [plan])["layer.weight"].read(0, rows) for _ in range(2)]
        assert same(found[0], found[1])
        assert same(found[0], solve(values, scheme))
    assert len(tiles(own_cache)) == 3
