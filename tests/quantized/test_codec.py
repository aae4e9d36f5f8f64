import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantized.codec import load_layer, matrix_entries, matrix_tensors, save_layer
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme, PaletteMatrix, PaletteScheme
from fastvlm_convert.weights.safetensors_file import Layout

ROWS, COLUMNS = 10, 96
AFFINE = [
    AffineScheme(bits, block, symmetric)
    for bits in (4, 8)
    for block in (None, 16, 32)
    for symmetric in (True, False)
]
PALETTES = [
    PaletteScheme(bits, size, scale) for bits in (4, 6, 8) for size in (4, 16) for scale in (True, False)
]
SCHEMES = [*AFFINE, *PALETTES]


def solved(scheme, rows=ROWS, columns=COLUMNS):
    rng = np.random.default_rng(7)
    weights = (rng.standard_normal((rows, columns)) + 0.3).astype(np.float32)
    if isinstance(scheme, AffineScheme):
        return quantize_affine(weights, scheme)
    values = {"palette": rng.standard_normal((scheme.num_groups(rows), scheme.levels)).astype(np.float16)}
    scale = rng.random(rows).astype(np.float16) if scheme.per_channel_scale else None
    indices = rng.integers(0, scheme.levels, (rows, columns), np.uint8)
    return PaletteMatrix(scheme, indices, values["palette"], scale)


def same(a, b):
    for name in vars(a):
        ours, theirs = getattr(a, name), getattr(b, name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs


def read(weight):
    return weight.read(0, weight.rows) if isinstance(weight.scheme, AffineScheme) else weight.matrix()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_layer_comes_back_as_it_was(scheme, tmp_path):
    matrix = solved(scheme)
    bias = np.arange(ROWS, dtype=np.float32)
    save_layer(tmp_path / "a", matrix, {"decoder.norm.weight": bias, "b": -bias})
    weight, floats = load_layer(tmp_path / "a", (ROWS, COLUMNS), scheme)
    same(read(weight), matrix)
    assert {name: w.dtype for name, w in floats.items()} == {"b": "float32", "decoder.norm.weight": "float32"}
    np.testing.assert_array_equal(floats["decoder.norm.weight"].array(), bias)
    np.testing.assert_array_equal(weight.dense().array(), matrix.dequantized())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_safetensors_package_reads_the_same_tensors(scheme, tmp_path):
    matrix = solved(scheme)
    save_layer(tmp_path / "a", matrix, {"c": np.ones(3, np.float32)})
    theirs = load_file(tmp_path / "a")
    ours = matrix_tensors(matrix)
    assert set(theirs) == {"c", *(f"weight.{part}" for part in ours)}
    entries = matrix_entries(scheme, ROWS, COLUMNS)
    assert {part: (array.dtype.name, array.shape) for part, array in ours.items()} == entries
    for part, array in ours.items():
        np.testing.assert_array_equal(theirs[f"weight.{part}"], array)


@pytest.mark.parametrize("scheme", AFFINE, ids=str)
def test_rows_are_read_alone(scheme, tmp_path):
    matrix = solved(scheme)
    save_layer(tmp_path / "a", matrix, {})
    weight, _ = load_layer(tmp_path / "a", (ROWS, COLUMNS, 1, 1), scheme)
    part = weight.read(3, 7)
    same(part, AffineMatrix(scheme, matrix.q[3:7], matrix.scale[3:7], matrix.zero_point[3:7]))
    assert weight.dense().read(3, 7).shape == (4, COLUMNS, 1, 1)


def test_the_same_layer_gives_the_same_bytes(tmp_path):
    matrix = solved(AFFINE[0])
    floats = {name: np.full(2, i, np.float32) for i, name in enumerate("cab")}
    save_layer(tmp_path / "a", matrix, floats)
    save_layer(tmp_path / "b", matrix, dict(reversed(floats.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_layer_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    save_layer(path, solved(AFFINE[0]), {})
    before = path.read_bytes()

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Layout, "write", no_room)
    with pytest.raises(OSError, match="No space left"):
        save_layer(path, solved(AFFINE[1]), {})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == before


ASYMMETRIC = AffineScheme(4, 32, False)
PALETTE = PaletteScheme(6, 4, True)


def damaged(tmp_path, matrix, **changes):
    tensors = {f"weight.{p}": torch.from_numpy(a.copy()) for p, a in matrix_tensors(matrix).items()}
    for name, change in changes.items():
        change(tensors) if name == "edit" else tensors.update({f"weight.{name}": change})
    save_file(tensors, tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edit": lambda t: t.pop("weight.scale")}, "'weight.scale' is missing"),
        (
            {"q": torch.zeros(ROWS, 47, dtype=torch.uint8)},
            r"'weight.q' is uint8 \[10, 47\]",
        ),
        ({"q": torch.zeros(ROWS, 48)}, r"'weight.q' is float32"),
        ({"scale": torch.ones(ROWS, 4).half()}, r"needs float16 \[10, 3\]"),
        ({"edit": lambda t: t.pop("weight.zero_point")}, "'weight.zero_point' is missing"),
    ],
)
def test_a_layer_of_another_form_is_refused_at_once(tmp_path, changes, message):
    path = damaged(tmp_path, solved(ASYMMETRIC), **changes)
    with pytest.raises(CheckpointError, match=message):
        load_layer(path, (ROWS, COLUMNS), ASYMMETRIC)


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        (ASYMMETRIC, {"zero_point": torch.full((ROWS, 3), 16, dtype=torch.uint8)}, "16, more than 4 bits"),
        (ASYMMETRIC, {"scale": torch.full((ROWS, 3), torch.nan).half()}, "'weight.scale' holds values that"),
        (PALETTE, {"scale": torch.full((ROWS,), torch.inf).half()}, "'weight.scale' holds values that"),
        (PALETTE, {"palette": torch.full((3, 64), torch.nan).half()}, "'weight.palette' holds values that"),
    ],
)  # fmt: skip
def test_values_that_are_impossible_are_refused_when_read(tmp_path, scheme, changes, message):
    weight, _ = load_layer(damaged(tmp_path, solved(scheme), **changes), (ROWS, COLUMNS), scheme)
    with pytest.raises(CheckpointError, match=message):
        read(weight)


def test_a_layer_that_is_not_there_or_cut_off_is_refused(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(CheckpointError, match="is missing"):
        load_layer(path, (ROWS, COLUMNS), ASYMMETRIC)
    save_layer(path, solved(ASYMMETRIC), {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        load_layer(path, (ROWS, COLUMNS), ASYMMETRIC)
