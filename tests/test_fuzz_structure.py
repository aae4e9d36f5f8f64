"""Files whose structure hypothesis changes, beside single bytes and values (`test_fuzz.py`).

Seconds in `make test`; `make soak` tries a hundred times as many files, other ones every time.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_safetensors

from fastvlm_convert.checkpoint.quantized_checkpoint import read_record
from fastvlm_convert.checkpoint.torch_zip import read_torch_zip
from fastvlm_convert.errors import MAX_MESSAGE, ConversionError
from fastvlm_convert.manifest import is_bundle, load_manifest
from fastvlm_convert.questions import read_questions
from fastvlm_convert.recipe import load_recipe, shipped_recipes
from fastvlm_convert.runtime.onnx_contract import check_manifest
from fastvlm_convert.weights.safetensors_file import read_safetensors
from tests.bundles import copy_bundle

# One folder serves all examples of a test; what an example writes is written anew by the next.
parsers = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

NUMBERS = (
    st.integers() | st.floats() | st.sampled_from([0, -1, 1 << 40, 10**30, 10**399, -(10**399), 1e308, -0.0])
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", ".", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "<image>", "*", "\x1b[31m", "\u2028"]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=5
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with some place in it replaced, removed, renamed, repeated or added."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 6)) == 0:
        return draw(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    copied = value.copy()
    match draw(st.integers(0, 9)):
        case 0:
            del copied[key]
        case 1:
            if isinstance(copied, dict):
                copied[draw(TEXTS)] = copied.pop(key)
            else:
                copied.append(copied[key])
        case 2:
            other = draw(st.sampled_from(keys))
            copied[key], copied[other] = copied[other], copied[key]
        case _:
            copied[key] = draw(changed(copied[key]))
    return copied


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """A file with bytes changed, cut off, left out or repeated."""
    data = bytearray(raw)
    first, last = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    match draw(st.integers(0, 4)):
        case 0:
            return bytes(data[:first])
        case 1:
            return bytes(data[:first] + data[last:])
        case 2:
            return bytes(data[:last] + data[first:])
        case _:
            for place in draw(st.lists(st.integers(0, max(0, len(data) - 1)), max_size=4)):
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=2))
    return bytes(data)


def documents(raw: bytes) -> st.SearchStrategy[bytes]:
    """Files made of a JSON file: other values, or other bytes."""
    value = json.loads(raw)
    texts = changed(value).map(lambda v: json.dumps(v).encode()) | changed(value).map(
        lambda v: json.dumps(v, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )
    return texts | damaged(raw) | st.binary(max_size=40)


def attempt(use: Callable[[], object]) -> bool:
    """Whether something could be used; if not, it said so as it should."""
    try:
        use()
    except ConversionError as error:
        check(error)
        return False
    return True


def check(error: ConversionError) -> None:
    said = str(error)
    assert said
    assert said.isprintable()
    assert len(error.args[0]) <= MAX_MESSAGE
    assert error.hint


def read_all(weights: dict[str, Any]) -> None:
    for weight in weights.values():
        if weight.dtype.startswith(("float", "bfloat")) and weight.size < 1 << 20:
            assert np.isfinite(weight.array()).all()


RECIPES = {name: yaml.safe_load(path.read_text()) for name, path in shipped_recipes().items()}
YAML_PIECES = st.sampled_from(
    ["a", "name", ": ", "- ", "\n", "  ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!int ", "!!float ", "? ",
     "0x_", "1_0", "2001-99-99", ".nan", "'", '"', "|", ">", "#", "%", "\t", "\0", "\ud800", "~", "!!bool x"]
)  # fmt: skip


@parsers
@given(st.data())
def test_recipes(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "mine.yaml"
    good = data.draw(st.sampled_from(sorted(RECIPES)))
    kind = data.draw(st.integers(0, 3))
    if kind == 0:
        text = "".join(data.draw(st.lists(YAML_PIECES, max_size=12)))
        raw = text.encode("utf-8", "surrogatepass") + shipped_recipes()[good].read_bytes() * (len(text) % 2)
    elif kind == 1:
        raw = data.draw(damaged(shipped_recipes()[good].read_bytes()))
    else:
        raw = yaml.safe_dump(data.draw(changed(RECIPES[good]))).encode()
    path.write_bytes(raw)
    attempt(lambda: load_recipe(str(path)).to_dict())


def with_file(folder: Path, name: str, raw: bytes, use: Callable[[], object]) -> None:
    """Use a folder while one of its files is another."""
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(raw)
    try:
        attempt(use)
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)


TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.ones((2, 2), np.float16),
    "n": np.arange(3),
}


@parsers
@given(st.data())
def test_safetensors(tmp_path: Path, data: st.DataObject) -> None:
    raw = save_safetensors(TENSORS)
    length = int.from_bytes(raw[:8], "little")
    header = data.draw(documents(raw[8 : 8 + length]))
    claimed = len(header) if data.draw(st.booleans()) else data.draw(st.integers(0, 1 << 64)) % (1 << 64)
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + header + raw[8 + length :])
    attempt(lambda: read_all(read_safetensors(path)))


OPCODES = st.sampled_from([
    pickle.MARK, pickle.STOP, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.NONE, pickle.NEWTRUE,
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
    pickle.TUPLE3, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.DICT, pickle.LIST,
    pickle.BUILD, pickle.REDUCE, pickle.BINPERSID, pickle.PERSID + b"x\n", pickle.BINPUT + b"\0",
    pickle.BINGET + b"\0", pickle.LONG_BINPUT + b"\xff\xff\xff\x7f", pickle.LONG_BINGET + b"\0\0\0\0",
    pickle.MEMOIZE, pickle.BININT1 + b"\2", pickle.LONG1 + b"\1\xff", pickle.LONG4 + b"\xff\xff\xff\x7f",
    pickle.BINUNICODE + b"\1\0\0\0a", pickle.SHORT_BINUNICODE + b"\7storage", pickle.BINFLOAT + bytes(8),
    pickle.BYTEARRAY8 + b"\0\0\0\0\2\0\0\0", pickle.BINBYTES8 + b"\0\0\0\0\2\0\0\0", pickle.FRAME + bytes(8),
    pickle.GLOBAL + b"collections\nOrderedDict\n", pickle.GLOBAL + b"torch\nFloatStorage\n",
    pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n", pickle.GLOBAL + b"os\nsystem\n",
    pickle.STACK_GLOBAL, pickle.INST + b"os\nsystem\n", pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EMPTY_SET,
    pickle.ADDITEMS, pickle.FROZENSET, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1 + b"\1",
    pickle.INT + b"1\n", pickle.LONG + b"1L\n", pickle.STRING + b"'a'\n", pickle.UNICODE + b"a\n",
])  # fmt: skip


@pytest.fixture(scope="module")
def torch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "a.bin"
    torch.save({"a": torch.ones(3, 4), "b": torch.ones(2, 6).t(), "n": torch.tensor(7)}, path)
    return path


@parsers
@given(st.data())
def test_torch_archives(torch_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.bin"
    if data.draw(st.integers(0, 3)) == 0:
        path.write_bytes(data.draw(damaged(torch_file.read_bytes())))
    else:
        with zipfile.ZipFile(torch_file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        (name,) = [n for n in members if n.endswith("data.pkl")]
        opcodes = st.lists(OPCODES, max_size=25).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")
        members[name] = data.draw(opcodes | damaged(members[name]))
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    attempt(lambda: read_all(read_torch_zip(path)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, fp32_bundle: Path) -> Path:
    return copy_bundle(fp32_bundle, tmp_path_factory.mktemp("bundle"))


@parsers
@given(st.data())
def test_manifests(bundle: Path, data: st.DataObject) -> None:
    raw = data.draw(documents((bundle / "fastvlm_manifest.json").read_bytes()))

    def use() -> None:
        is_bundle(bundle)
        manifest = load_manifest(bundle)
        if "onnx" in manifest.targets:
            check_manifest(manifest)

    with_file(bundle, "fastvlm_manifest.json", raw, use)


@parsers
@given(st.data())
def test_records_of_quantized_checkpoints(
    golden_quantized: Path, tmp_path: Path, data: st.DataObject
) -> None:
    value = json.loads((golden_quantized / "quantized.json").read_text())
    layers = st.integers(0, len(value["layers"]) - 1).flatmap(
        lambda at: changed(value["layers"][at]).map(
            lambda layer: json.dumps({**value, "layers": [*value["layers"][:at], layer]}).encode()
        )
    )
    raw = data.draw(documents((golden_quantized / "quantized.json").read_bytes()) | layers)
    (tmp_path / "quantized.json").write_bytes(raw)
    attempt(lambda: read_record(tmp_path).to_json())


@parsers
@given(st.data())
def test_lists_of_pictures(tmp_path: Path, data: st.DataObject) -> None:
    """Those to calibrate with and to verify with."""
    entry = {"image": "a.png", "question": "What?", "answer": "A circle."}
    lines = st.lists(documents(json.dumps(entry).encode()), max_size=3).map(b"\n".join)
    listing = documents(json.dumps([entry, entry]).encode())
    (tmp_path / "list.jsonl").write_bytes(data.draw(lines))
    (tmp_path / "questions.json").write_bytes(data.draw(listing))
    attempt(lambda: read_questions(tmp_path / "list.jsonl"))
    attempt(lambda: read_questions(tmp_path))


def test_the_unchanged_files_are_good(bundle: Path, golden_quantized: Path) -> None:
    """Else all of the above might fail at once, for another reason."""
    assert attempt(lambda: check_manifest(load_manifest(bundle)))
    assert attempt(lambda: read_record(golden_quantized))
    assert all(attempt(lambda name=name: load_recipe(name)) for name in RECIPES)


@given(st.data())
def test_the_changes_change_something(data: st.DataObject) -> None:
    value = {"a": [1, 2, {"b": "c"}], "d": None}
    assume(data.draw(changed(value)) != value)
