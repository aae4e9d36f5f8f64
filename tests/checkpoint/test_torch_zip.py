import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastvlm_convert.checkpoint.torch_zip import read_torch_zip
from fastvlm_convert.errors import CheckpointError

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def rewrite(path: Path, changes: dict[str, bytes | None]) -> None:
    """Replace members of an archive, by the end of their name; None removes one."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            new = next((v for k, v in changes.items() if name.endswith(k)), content)
            if new is not None:
                archive.writestr(name, new)


def save(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def various(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors that lie in their storages in all the ways that torch knows."""
    base = (torch.randn(6, 8, generator=torch.Generator().manual_seed(3)) * 10).to(dtype)
    conv = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).to(dtype)
    return {
        "plain": base.clone(),
        "transposed": base.t(),
        "columns": base[:, 3:7],
        "rows": base[2:],
        "every_second": base[::2, 1::3],
        "expanded": base[:1].expand(5, 8),
        "channels_last": conv.to(memory_format=torch.channels_last),
        "kernel_1x1": conv[:, :, :1, :1],
        "scalar": base[3, 4],
        "empty": torch.empty(0, 5, dtype=dtype),
        "empty_inside": torch.empty(5, 0, dtype=dtype),
        "no_elements": torch.empty(0, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reads_what_torch_reads(dtype, tmp_path):
    path = save(tmp_path / "a.bin", various(dtype))
    theirs, ours = torch.load(path, weights_only=True), read_torch_zip(path)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        expected = tensor.to(torch.float32).numpy()
        assert ours[name].shape == tuple(tensor.shape), name
        assert ours[name].dtype == str(dtype).removeprefix("torch.")
        whole = ours[name].array()
        assert whole.flags.c_contiguous, name
        np.testing.assert_array_equal(whole, expected, err_msg=name)
        if tensor.dim() and len(tensor) > 2:
            np.testing.assert_array_equal(ours[name].read(1, 3), expected[1:3], err_msg=name)


def test_reads_parameters_and_a_nested_state_dict(tmp_path):
    linear = nn.Linear(3, 2)
    parameters = read_torch_zip(save(tmp_path / "a.bin", dict(linear.named_parameters())))
    nested = read_torch_zip(save(tmp_path / "b.bin", {"state_dict": linear.state_dict(), "epoch": 3}))
    for weights in (parameters, nested):
        assert set(weights) == {"weight", "bias"}
        np.testing.assert_array_equal(weights["weight"].array(), linear.weight.detach().numpy())


def test_integers_are_listed_but_not_read_as_weights(tmp_path):
    weights = read_torch_zip(save(tmp_path / "a.bin", {"count": torch.tensor(5), "w": torch.ones(2)}))
    assert weights["count"].dtype == "int64"
    with pytest.raises(CheckpointError, match="'count' is stored as int64"):
        weights["count"].array()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_is_no_number_is_named(transposed, tmp_path):
    tensor = torch.ones(3, 4)
    tensor[1, 2] = float("nan")
    weights = read_torch_zip(save(tmp_path / "a.bin", {"w": tensor.t() if transposed else tensor}))
    with pytest.raises(CheckpointError, match="tensor 'w' holds 1 values"):
        weights["w"].array()


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self.sentinel}'",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    sentinel = tmp_path / "sentinel"
    path = save(tmp_path / "a.bin", {"w": torch.ones(2), "x": Trap(sentinel)})
    with pytest.raises(
        CheckpointError, match=r"refused to read its pickle: it refers to '\w+\.system'"
    ) as caught:
        read_torch_zip(path)
    assert not sentinel.exists()
    assert "state_dict" in (caught.value.hint or "")
    torch.load(path, weights_only=False)  # the trap is real
    assert sentinel.exists()


def test_code_in_a_stock_opcode_stream_is_refused_and_not_run(tmp_path):
    path, sentinel = tmp_path / "a.bin", tmp_path / "sentinel"
    command = f"touch '{sentinel}'".encode()
    for stream in (
        b"cos\nsystem\n(V" + command + b"\ntR.",
        b"(V" + command + b"\nios\nsystem\n.",
        b"c__builtin__\neval\n(V1\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R.",
    ):
        save(path, {"w": torch.ones(2)})
        rewrite(path, {"data.pkl": stream})
        with pytest.raises(CheckpointError, match="refused to read its pickle"):
            read_torch_zip(path)
    assert not sentinel.exists()


def test_a_pickle_cannot_change_a_tensor_after_it_was_checked(tmp_path):
    path = save(tmp_path / "a.bin", {"w": torch.ones(4)})
    with zipfile.ZipFile(path) as archive:
        stream = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    build = b"}(X\x05\x00\x00\x00shapeK\x07ub"  # tensor.__dict__.update(shape=7)
    call = stream.index(b"R", stream.index(b"_rebuild_tensor_v2"))  # the call that makes the OrderedDict
    call = stream.index(b"tq", call)
    end = stream.index(b"R", call) + 1
    rewrite(path, {"data.pkl": stream[:end] + build + stream[end:]})
    with pytest.raises(CheckpointError, match="damaged pickle"):
        read_torch_zip(path)


def test_a_huge_memo_index_takes_no_memory(tmp_path):
    path = save(tmp_path / "a.bin", {"w": torch.ones(4)})
    rewrite(path, {"data.pkl": b"\x80\x02}r\xff\xff\xff\x7f."})  # the unpickler in C would allocate 32 GiB
    assert read_torch_zip(path) == {}


def test_the_legacy_format_is_a_clear_error(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="legacy format") as caught:
        read_torch_zip(tmp_path / "a.bin")
    assert "weights_only=True" in (caught.value.hint or "")


def test_the_fix_that_the_legacy_error_names_works(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    torch.save(torch.load(path, weights_only=True), path)
    assert read_torch_zip(path)["w"].array().tolist() == [1, 1]


def test_what_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(CheckpointError, match=r"'a\.bin' is missing"):
        read_torch_zip(path)
    for content in (b"", b"hello", b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="neither a zip archive nor a pickle"):
            read_torch_zip(path)


def test_an_archive_of_something_else_is_refused(tmp_path):
    for names in ((), ("word/document.xml",), ("data.pkl",), ("a/data.pkl", "b/data.pkl"), ("a/b/data.pkl",)):
        with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
            for name in names:
                archive.writestr(name, b"\x80\x02}.")
        with pytest.raises(CheckpointError, match=r"no data\.pkl"):
            read_torch_zip(tmp_path / "a.bin")


def test_a_truncated_archive_is_refused(tmp_path):
    path = save(tmp_path / "a.bin", {"w": torch.ones(1000)})
    whole = path.read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged archive"):
            read_torch_zip(path)


def test_an_archive_that_claims_to_span_disks_is_refused(tmp_path):
    path = save(tmp_path / "a.bin", {"w": torch.ones(10)})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x06\x07") + 16] = 2
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged archive: zipfiles that span multiple disks"):
        read_torch_zip(path)


def test_a_local_header_out_of_place_is_refused(tmp_path):
    path = save(tmp_path / "a.bin", {"w": torch.ones(10)})
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        offset = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data/0"))
    path.write_bytes(raw[:offset] + b"XX" + raw[offset + 2 :])
    with pytest.raises(CheckpointError, match="a local header is missing"):
        read_torch_zip(path)


def test_a_storage_that_is_too_short_or_missing_is_noticed(tmp_path):
    path = save(tmp_path / "a.bin", {"w": torch.ones(10)})
    rewrite(path, {"data/0": bytes(36)})
    with pytest.raises(CheckpointError, match="tensor 'w' reaches outside its storage"):
        read_torch_zip(path)
    save(path, {"w": torch.ones(10)})
    rewrite(path, {"data/0": None})
    with pytest.raises(CheckpointError, match="tensor 'w' has no"):
        read_torch_zip(path)


@pytest.mark.parametrize(
    ("member", "message"), [("data.pkl", r"its data\.pkl is .* compressed"), ("data/0", "tensor 'w' has no")]
)
def test_a_compressed_member_is_refused(member, message, tmp_path):
    path = save(tmp_path / "a.bin", {"w": torch.ones(100)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            compression = zipfile.ZIP_DEFLATED if name.endswith(member) else zipfile.ZIP_STORED
            archive.writestr(name, content, compression)
    with pytest.raises(CheckpointError, match=message):
        read_torch_zip(path)


class Impostor:
    """Pickles as a call of torch's `_rebuild_tensor_v2` with arguments of our choice."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Storage:
    """Pickles as a reference to a storage; see `StoragePickler`."""

    def __init__(self, pid: tuple[object, ...]) -> None:
        self.pid = pid


class StoragePickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.pid if isinstance(obj, Storage) else None


FLOATS_0 = Storage(("storage", torch.FloatStorage, "0", "cpu", 10))
IMPOSTORS = {
    "shape beyond the storage": ((FLOATS_0, 0, (11,), (1,)), "reaches outside its storage"),
    "offset beyond the storage": ((FLOATS_0, 1, (10,), (1,)), "reaches outside its storage"),
    "stride beyond the storage": ((FLOATS_0, 0, (5,), (3,)), "reaches outside its storage"),
    "negative offset": ((FLOATS_0, -1, (5,), (1,)), "impossible strides"),
    "negative stride": ((FLOATS_0, 9, (5,), (-1,)), "impossible strides"),
    "stride as text": ((FLOATS_0, 0, (5,), ("1",)), "impossible strides"),
    "negative shape": ((FLOATS_0, 0, (-5,), (1,)), "impossible shape"),
    "absurd shape": ((FLOATS_0, 0, (1 << 20, 1 << 20), (0, 0)), "absurd shape"),
    "shape and strides of different lengths": ((FLOATS_0, 0, (5,), (1, 1)), "malformed tensor shape"),
    "shape is a list": ((FLOATS_0, 0, [5], [1]), "malformed tensor shape"),
    "offset as text": ((FLOATS_0, "0", (5,), (1,)), "malformed tensor"),
    "storage is no storage": (({}, 0, (5,), (1,)), "malformed tensor"),
    "too few arguments": ((FLOATS_0,), "damaged pickle"),
    "another device class": (
        (Storage(("module", torch.FloatStorage, "0", "cpu", 10)), 0, (5,), (1,)), "unknown storage",
    ),
    "storage without a type": ((Storage(("storage", "f", "0", "cpu", 10)), 0, (5,), (1,)), "unknown storage"),
    "storage that is not there": (
        (Storage(("storage", torch.FloatStorage, "../data.pkl", "cpu", 10)), 0, (5,), (1,)), "has no",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSTORS)
def test_a_tensor_that_lies_is_refused(case, tmp_path):
    arguments, message = IMPOSTORS[case]
    path = save(tmp_path / "a.bin", {"w": torch.arange(10.0)})
    with (tmp_path / "data.pkl").open("wb") as file:
        StoragePickler(file, 2).dump({"w": Impostor(*arguments, False, OrderedDict())})
    rewrite(path, {"data.pkl": (tmp_path / "data.pkl").read_bytes()})
    with pytest.raises(CheckpointError, match=message):
        read_torch_zip(path)


def test_a_tensor_of_the_same_kind_that_does_not_lie_is_read(tmp_path):
    path = save(tmp_path / "a.bin", {"w": torch.arange(10.0)})
    with (tmp_path / "data.pkl").open("wb") as file:
        StoragePickler(file, 2).dump({"w": Impostor(FLOATS_0, 1, (3,), (3,), False, OrderedDict())})
    rewrite(path, {"data.pkl": (tmp_path / "data.pkl").read_bytes()})
    assert read_torch_zip(path)["w"].array().tolist() == [1, 4, 7]


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), "text", 3])
def test_a_pickle_without_a_dictionary_is_refused(value, tmp_path):
    with pytest.raises(CheckpointError, match="no dictionary of tensors"):
        read_torch_zip(save(tmp_path / "a.bin", value))


def test_a_member_at_an_absurd_place_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"w": torch.ones(100)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.getinfo(next(n for n in members if n.endswith("data/0"))).header_offset = (1 << 64) - 1000
    with pytest.raises(CheckpointError, match="a local header is missing"):
        read_torch_zip(path)
