import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights.file_tensors import MAX_TENSOR_AXES, item_size
from fastvlm_convert.weights.safetensors_file import MAX_HEADER_BYTES, lay_out, read_safetensors
from tests.checkpoints import SETS, copy_checkpoint, read_tensors

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape: object = (2, 2), offsets: object = (0, 16), dtype: object = "F32") -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize("name", SETS)
def test_reads_what_the_safetensors_package_reads(name, tmp_path):
    folder = copy_checkpoint(name, tmp_path)
    ours = {n: w for path in folder.glob("*.safetensors") for n, w in read_safetensors(path).items()}
    theirs = read_tensors(folder)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].shape == tuple(tensor.shape)
        assert ours[key].dtype == str(tensor.dtype).removeprefix("torch.")
        if tensor.is_floating_point():
            np.testing.assert_array_equal(ours[key].array(), tensor.float().numpy())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_dtype_is_read_exactly_and_by_rows(dtype, tmp_path):
    tensor = (torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    extremes = torch.tensor([0.0, -0.0, 1.0, torch.finfo(dtype).tiny, 6e4]).to(dtype)
    save_file({"w": tensor, "e": extremes, "s": torch.tensor(2.5, dtype=dtype)}, tmp_path / "a.safetensors")
    weights = read_safetensors(tmp_path / "a.safetensors")
    expected = tensor.to(torch.float32).numpy()
    whole = weights["w"].array()
    assert whole.dtype == np.float32
    assert whole.flags.c_contiguous
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(weights["w"].read(2, 5), expected[2:5])
    np.testing.assert_array_equal(weights["e"].array(), extremes.to(torch.float32).numpy())
    assert weights["s"].shape == ()
    assert weights["s"].array() == 2.5


def test_metadata_is_no_tensor(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert list(read_safetensors(tmp_path / "a.safetensors")) == ["w"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_weight_that_is_no_number_is_named(bad, dtype, tmp_path):
    tensor = torch.ones(4, 4, dtype=dtype)
    tensor[2, 1] = bad
    save_file({"fine": torch.ones(2), "broken": tensor}, tmp_path / "a.safetensors")
    weights = read_safetensors(tmp_path / "a.safetensors")
    weights["fine"].array()
    weights["broken"].read(0, 2)  # the rows without it are fine
    with pytest.raises(CheckpointError, match=r"tensor 'broken' holds 1 values that are NaN or infinite"):
        weights["broken"].array()


def test_a_float64_beyond_float32_is_refused(tmp_path):
    save_file({"w": torch.tensor([1e300], dtype=torch.float64)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="'w' holds 1 values"):
        read_safetensors(tmp_path / "a.safetensors")["w"].array()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_reading_a_tensor_of_another_kind_is_refused(dtype, tmp_path):
    save_file({"w": torch.ones(4).to(dtype)}, tmp_path / "a.safetensors")
    weight = read_safetensors(tmp_path / "a.safetensors")["w"]
    with pytest.raises(CheckpointError, match=f"tensor 'w' is stored as {weight.dtype}"):
        weight.array()


MALFORMED = {
    "no file": (None, "'a.safetensors' is missing"),
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x10\0\0", "not a safetensors file"),
    "text": (b"These are not the weights you are looking for.\n", "not a safetensors file"),
    "pickle": (b"\x80\x02}q\x00.", "not a safetensors file"),
    "header beyond the limit": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        "its header claims .* damaged",
    ),
    "no length": (b"{}", "not a safetensors file"),
    "header cut off": (struct.pack("<Q", 100) + b'{"w": ', "header is truncated"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_safetensors_file_is_refused(case, tmp_path):
    content, message = MALFORMED[case]
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert str(tmp_path) in str(caught.value)


BAD_HEADERS = {
    "no JSON": (b"{'w': 1}", "header is no JSON"),
    "not UTF-8": (b'{"\xff": 1}', "header is no JSON"),
    "a number of 5000 digits": (b'{"w": ' + b"9" * 5000 + b"}", "header is no JSON"),
    "nested too deep": (b"[" * 100_000, "header is no JSON"),
    "no object": ([1, 2], "header is no JSON object"),
    "entry is no object": ({"w": 3}, "malformed header entry of tensor 'w'"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, "malformed header entry"),
    "offsets as text": (entry(offsets=["0", "16"]), "malformed header entry"),
    "three offsets": (entry(offsets=[0, 8, 16]), "malformed header entry"),
    "unknown dtype": (entry(dtype="F8_E4M3"), "dtype F8_E4M3; supported are"),
    "negative dimension": (entry(shape=[-2, 2]), r"impossible shape \[-2, 2\]"),
    "fractional dimension": (entry(shape=[2.0, 2]), "impossible shape"),
    "boolean dimension": (entry(shape=[True, 4]), "impossible shape"),
    "absurd dimension": (entry(shape=[1 << 40]), "impossible shape"),
    "absurd product": (entry(shape=[1 << 30, 1 << 30]), "absurd shape"),
    "too many dimensions": (entry(shape=[1] * MAX_TENSOR_AXES + [4]), "impossible shape"),
    "offsets disagree with the shape": (entry(offsets=[0, 12]), r"but \[2, 2\] of float32 need 16"),
    "offsets backwards": (entry(offsets=[16, 0]), "claims -16 bytes"),
    "negative offset": (entry(offsets=[-16, 0]), "starts at byte -16; the header is damaged"),
    "beyond the file": (entry(offsets=[8, 24]), "it is truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_an_inconsistent_header_is_refused(case, tmp_path):
    header, message = BAD_HEADERS[case]
    path = write_raw(tmp_path / "a.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(path)


def test_the_same_header_without_the_fault_is_accepted(tmp_path):
    path = write_raw(tmp_path / "a.safetensors", entry(), np.arange(4, dtype="<f4").tobytes())
    np.testing.assert_array_equal(read_safetensors(path)["w"].array(), [[0, 1], [2, 3]])


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path):
    path = write_raw(tmp_path / "a.safetensors", entry(), bytes(16))
    weight = read_safetensors(path)["w"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        weight.array()


def test_a_file_that_cannot_be_read_is_an_error_for_the_user(tmp_path, monkeypatch):
    path = write_raw(tmp_path / "a.safetensors", entry(), bytes(16))
    weight = read_safetensors(path)["w"]

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot read: Permission denied"):
        read_safetensors(path)
    with pytest.raises(CheckpointError, match="cannot read: Permission denied"):
        weight.array()


def test_tensors_that_share_bytes_are_refused(tmp_path):
    header = entry() | {"v": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    path = write_raw(tmp_path / "a.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError, match="tensors 'w' and 'v' overlap"):
        read_safetensors(path)


def test_what_it_writes_the_safetensors_package_reads(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {
        "bytes": rng.integers(0, 256, (3, 5), np.uint8),
        "half": rng.standard_normal((2, 3)).astype(np.float16),
        "single \u00e4": rng.standard_normal((4, 2, 3)).astype(np.float32),
        "scalar": np.float32(2.5).reshape(()),
        "many": np.arange(7, dtype=np.int64),
    }
    layout = lay_out(tmp_path / "a", {n: (a.dtype.name, a.shape) for n, a in arrays.items()})
    layout.create()
    for name, array in reversed(arrays.items()):  # in any order
        layout.write(name, [array] if array.ndim < 2 else [array[:1], array[1:]])
    theirs = load_file(tmp_path / "a")
    assert set(theirs) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)
    assert layout.size == (tmp_path / "a").stat().st_size
    for tensor in layout.tensors.values():
        assert tensor.offset % item_size(tensor.dtype) == 0
    assert len(layout.header) % 8 == 0


def test_rows_are_written_where_they_belong(tmp_path):
    layout = lay_out(tmp_path / "a", {"w": ("float32", (5, 2))})
    layout.create()
    layout.write("w", [np.ones((2, 2), np.float32)], first_row=3)
    np.testing.assert_array_equal(load_file(tmp_path / "a")["w"], np.repeat([[0], [0], [0], [1], [1]], 2, 1))
