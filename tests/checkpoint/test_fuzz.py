"""Hundreds of damaged files, the same every time: each loads, or is a `ConversionError`, and nothing else."""

import json
import math
import random
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.checkpoint.tokenizer import read_tokenizer
from fastvlm_convert.checkpoint.torch_zip import read_torch_zip
from fastvlm_convert.errors import ConversionError
from fastvlm_convert.weights.safetensors_file import read_safetensors
from tests.checkpoints import HF, LLAVA, SHARDED, copy_checkpoint

JUNK = [
    None, True, -1, 0, 1, 3, 2**31, 2**70, 0.5, -2.5, 1e308, math.inf, math.nan, "", "x", "../x", "\ud800",
    "a\0b", "9" * 400, [], [0], [[]], ["model.safetensors"], {}, {"a": 1}, {"0": {"content": "<image>"}},
]  # fmt: skip
TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.ones(2, 2).half().t(),
    "c": torch.arange(6, dtype=torch.bfloat16)[1:5],
    "n": torch.tensor(7),
}


def flipped(raw: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, cut short, or with a piece left out or repeated."""
    data = bytearray(raw)
    kind = rng.randrange(6)
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if kind == 0:
        return bytes(data[:a])
    if kind == 1:
        return bytes(data[:a] + data[b:])
    if kind == 2:
        return bytes(data[:b] + data[a:])
    for _ in range(rng.choice((1, 1, 2, 8))):
        i = rng.randrange(len(data))
        data[i] = data[i] ^ (1 << rng.randrange(8)) if kind < 5 else rng.randrange(256)
    return bytes(data)


def junked(value: object, rng: random.Random) -> object:
    """A JSON value with one place in it replaced, removed or renamed."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        changed = value.copy()
        kind = rng.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1 and isinstance(changed, dict):
            changed[rng.choice(["", "x", "model.layers.9999999.x", str(key) + ".0", "\ud800"])] = changed.pop(
                key
            )
        else:
            changed[key] = junked(changed[key], rng)
        return changed
    return rng.choice(JUNK)


def tally(attempts: int, attempt) -> tuple[int, int]:
    """Run attempts; how many succeeded and how many failed as they may."""
    messages = []
    for i in range(attempts):
        try:
            attempt(random.Random(i))
        except ConversionError as error:
            messages.append(str(error))
    assert all(message and message.isprintable() for message in messages)
    return attempts - len(messages), len(messages)


def read_all(weights) -> None:
    for weight in weights.values():
        if weight.dtype.startswith(("float", "bfloat")):
            assert weight.array().shape == weight.shape
            assert all(np.isfinite(chunk).all() for chunk in weight.chunks())


def test_safetensors_files(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({k: v.contiguous() for k, v in TENSORS.items()}, path)
    raw = path.read_bytes()

    def attempt(rng):
        path.write_bytes(flipped(raw, rng))
        read_all(read_safetensors(path))

    good, bad = tally(600, attempt)
    assert good > 30
    assert bad > 200


def test_torch_archives(tmp_path):
    path = tmp_path / "a.bin"
    torch.save(TENSORS, path)
    raw = path.read_bytes()

    def attempt(rng):
        path.write_bytes(flipped(raw, rng))
        read_all(read_torch_zip(path))

    good, bad = tally(400, attempt)
    assert good > 50
    assert bad > 100


def test_pickles_in_archives_that_are_otherwise_whole(tmp_path):
    path = tmp_path / "a.bin"
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def attempt(rng):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, flipped(content, rng) if name.endswith("data.pkl") else content)
        read_all(read_torch_zip(path))

    good, bad = tally(600, attempt)
    assert good > 20
    assert bad > 300


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (LLAVA, "config.json"),
        (LLAVA, "generation_config.json"),
        (HF, "config.json"),
        (HF, "preprocessor_config.json"),
        (SHARDED, "model.safetensors.index.json"),
    ],
)
def test_settings(name, file, tmp_path):
    folder = copy_checkpoint(name, tmp_path)
    raw = (folder / file).read_bytes()
    value = json.loads(raw)

    def attempt(rng):
        changed = flipped(raw, rng) if rng.random() < 0.3 else json.dumps(junked(value, rng)).encode()
        (folder / file).write_bytes(changed)
        open_checkpoint(folder)

    good, bad = tally(100, attempt)
    assert good
    assert bad


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (LLAVA, "vocab.json"),
        (LLAVA, "added_tokens.json"),
        (LLAVA, "tokenizer_config.json"),
        (LLAVA, "merges.txt"),
        (HF, "tokenizer.json"),
    ],
)
def test_tokenizer_files(name, file, tmp_path):
    folder = copy_checkpoint(name, tmp_path)
    raw = (folder / file).read_bytes()
    value = None if file == "merges.txt" else json.loads(raw)

    def attempt(rng):
        plain = value is None or rng.random() < 0.3
        (folder / file).write_bytes(flipped(raw, rng) if plain else json.dumps(junked(value, rng)).encode())
        read_tokenizer(folder).encode("<|im_start|>user\nWhat is this?<|im_end|>")

    tally(100, attempt)


def test_headers_of_whole_checkpoints(tmp_path):
    folder = copy_checkpoint(LLAVA, tmp_path)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])

    def attempt(rng):
        changed = json.dumps(junked(header, rng)).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])
        open_checkpoint(folder)

    _, bad = tally(100, attempt)
    assert bad


def test_adapters(tmp_path):
    folder, adapter = copy_checkpoint(LLAVA, tmp_path), tmp_path / "adapter"
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {"lora_alpha": 8, "alpha_pattern": {"q_proj": 4}, "use_rslora": False, "init_lora_weights": True}

    def attempt(rng):
        shutil.rmtree(adapter, ignore_errors=True)
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps(junked(config, rng)))
        shapes = [rng.choice([(4, 64), (4, 64), (64, 4), (64,), (4, 64, 1), (0, 64), ()]) for _ in range(2)]
        tensors = {
            f"{query}.lora_A.weight": torch.ones(shapes[0]),
            f"{query}.lora_B.weight": torch.ones(shapes[1]),
        }
        if rng.random() < 0.3:
            tensors = {rng.choice([f"{query}.weight", "x", "lora_A", ".lora_A.weight"]): torch.ones(64, 64)}
        save_file(tensors, adapter / "adapter_model.safetensors")
        read_all(open_checkpoint(folder, adapter).weights)

    good, bad = tally(60, attempt)
    assert good
    assert bad
