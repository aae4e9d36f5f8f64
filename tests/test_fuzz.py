"""Every parser of files from outside, fed damaged ones: each is read, or refused in one clear line."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvlm_convert.checkpoint.adapter_folder import open_adapter
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.checkpoint.tokenizer import read_tokenizer
from fastvlm_convert.checkpoint.torch_zip import read_torch_zip
from fastvlm_convert.errors import ConversionError
from fastvlm_convert.manifest import FILE_NAME, load_manifest
from fastvlm_convert.messages import read_messages
from fastvlm_convert.pictures import load_image
from fastvlm_convert.questions import read_questions
from fastvlm_convert.recipe import load_recipe, shipped_recipes
from fastvlm_convert.weights.safetensors_file import read_safetensors
from tests.checkpoints import CASES, GOLDEN, HF, LLAVA

_EXAMPLES, _SOAK = 20, 5000
_MAX_LINE = 1000

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")]),
    st.text(max_size=20),
    st.sampled_from(["", ".", "..", "/", "\ud800", "\x00", "<|im_end|>", "{{", "(a+)+$", "x" * 10_000]),
    st.lists(st.integers(-2, 2**40), max_size=4),
    st.dictionaries(st.text(max_size=4), st.none() | st.integers(), max_size=3),
)


@dataclass(frozen=True)
class Seed:
    """A file that is right, and what reads it.

    Attributes:
        folder: What is copied; the file is in it.
        file: The file's name.
        read: Called with the copied folder.
    """

    folder: Path
    file: str
    read: Callable[[Path], object]


def _checkpoint(folder: Path) -> object:
    return open_checkpoint(folder)


HF_FOLDER, APPLE_FOLDER = (GOLDEN / name / "checkpoint" for name in (HF, LLAVA))
ADAPTER = CASES / "adapter-patterns-rslora"
JSON_SEEDS = [
    *[
        Seed(HF_FOLDER, name, _checkpoint)
        for name in (
            "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
            "tokenizer_config.json",
        )
    ],
    Seed(HF_FOLDER, "tokenizer.json", read_tokenizer),
    Seed(APPLE_FOLDER, "config.json", _checkpoint),
    Seed(APPLE_FOLDER, "vocab.json", read_tokenizer),
    Seed(APPLE_FOLDER, "added_tokens.json", read_tokenizer),
    Seed(GOLDEN / "tiny-llava-sharded" / "checkpoint", "model.safetensors.index.json", _checkpoint),
    Seed(next(ADAPTER.glob("**/adapter_config.json")).parent, "adapter_config.json", open_adapter),
]  # fmt: skip


@pytest.fixture(scope="module")
def examples(request) -> settings:
    return settings(max_examples=_SOAK if request.config.getoption("--soak") else _EXAMPLES)


def outcome(read: Callable[[], object]) -> str:
    """`read`, or what was said in refusing it: one line, not too long, with no words of Python's."""
    try:
        read()
    except ConversionError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < _MAX_LINE
        assert "object has no attribute" not in said
        assert "NoneType" not in said
        return said
    return "read"


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something stands; of long lists the first few."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:40]:
            yield from paths_of(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(min(len(value), 3)):
            yield from paths_of(value[number], (*path, number))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with another one at a place."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A few bytes changed, put in, cut out; or the end missing."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        match draw(st.sampled_from(["change", "insert", "remove", "cut"])):
            case "change":
                out[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                out[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del out[at : at + draw(st.integers(1, 64))]
            case "cut":
                del out[at:]
    return bytes(out)


def copied(seed: Seed, folder: Path) -> Path:
    """The seed's folder with links in place of files, its own file real."""
    folder.mkdir()
    for file in seed.folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / seed.file).unlink()
    shutil.copy(seed.folder / seed.file, folder / seed.file)
    return folder


def name_of(seed: Seed) -> str:
    return f"{seed.folder.parent.name}-{seed.file}"


@pytest.mark.parametrize("seed", JSON_SEEDS, ids=name_of)
def test_odd_values_in_json(seed, examples, tmp_path):
    folder = copied(seed, tmp_path / "copy")
    value = json.loads((seed.folder / seed.file).read_text())
    places = list(paths_of(value))

    @examples
    @given(st.sampled_from(places), ODD)
    def check(place, new):
        text = json.dumps(replaced(value, place, new))
        (folder / seed.file).write_text(text)
        outcome(lambda: seed.read(folder))

    check()


@pytest.mark.parametrize("seed", JSON_SEEDS, ids=name_of)
def test_damaged_json(seed, examples, tmp_path):
    folder = copied(seed, tmp_path / "copy")

    @examples
    @given(damaged((seed.folder / seed.file).read_bytes()))
    def check(content):
        (folder / seed.file).write_bytes(content)
        outcome(lambda: seed.read(folder))

    check()


def test_odd_values_in_a_manifest(fp16_bundle, examples, tmp_path):
    value = json.loads((fp16_bundle / FILE_NAME).read_text())
    places = list(paths_of(value))
    folder = copied(Seed(fp16_bundle, FILE_NAME, load_manifest), tmp_path / "copy")

    @examples
    @given(st.sampled_from(places), ODD)
    def check(place, new):
        (folder / FILE_NAME).write_text(json.dumps(replaced(value, place, new)))
        outcome(lambda: load_manifest(folder))

    check()


def test_odd_values_in_a_quantized_checkpoint(golden_quantized, examples, tmp_path):
    value = json.loads((golden_quantized / "quantized.json").read_text())
    places = list(paths_of(value))
    folder = copied(Seed(golden_quantized, "quantized.json", _checkpoint), tmp_path / "copy")

    @examples
    @given(st.sampled_from(places), ODD)
    def check(place, new):
        (folder / "quantized.json").write_text(json.dumps(replaced(value, place, new)))
        outcome(lambda: open_checkpoint(folder))

    check()


def test_damaged_safetensors(examples, tmp_path):
    content = (HF_FOLDER / "model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    path = tmp_path / "model.safetensors"

    @examples
    @given(damaged(content[:header]))
    def check(head):
        path.write_bytes(head + content[header:])
        outcome(lambda: read_safetensors(path))

    check()


def test_damaged_torch_files(examples, tmp_path):
    buffer = io.BytesIO()
    torch.save({"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(2, 3)}, buffer)
    path = tmp_path / "pytorch_model.bin"

    @examples
    @given(damaged(buffer.getvalue()))
    def check(content):
        path.write_bytes(content)
        outcome(lambda: read_torch_zip(path))

    check()


@pytest.mark.parametrize("name", ["int4-mixed", "ios-ane"])
def test_damaged_recipes(name, examples, tmp_path):
    path = tmp_path / "mine.yaml"

    @examples
    @given(damaged(shipped_recipes()[name].read_bytes()))
    def check(content):
        path.write_bytes(content)
        outcome(lambda: load_recipe(path))

    check()


@pytest.mark.parametrize(
    "scalar",
    ["0x_", "!!int x", "2001-99-99", "9" * 5000, "!!python/object:os.system ls", "&a [*a]", "1e999", "? x"],
)
@pytest.mark.parametrize("key", ["name", "decoder", "gates", "quantize"])
def test_odd_yaml_values(scalar, key, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\n{key}: {scalar}\n")
    outcome(lambda: load_recipe(path))


def test_damaged_chat_templates(examples, tmp_path):
    seed = Seed(HF_FOLDER, "chat_template.jinja", _checkpoint)
    folder = copied(seed, tmp_path / "copy")

    @examples
    @given(damaged((HF_FOLDER / seed.file).read_bytes()))
    def check(content):
        (folder / seed.file).write_bytes(content)
        outcome(lambda: open_checkpoint(folder))

    check()


def test_damaged_merges(examples, tmp_path):
    seed = Seed(APPLE_FOLDER, "merges.txt", read_tokenizer)
    folder = copied(seed, tmp_path / "copy")

    @examples
    @given(damaged((APPLE_FOLDER / seed.file).read_bytes()))
    def check(content):
        (folder / seed.file).write_bytes(content)
        outcome(lambda: read_tokenizer(folder))

    check()


def test_odd_messages_and_questions(examples, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    text = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    questions = [{"image": "a.png", "question": "What?", "answer": "A picture."}, {"question": "Why?"}]

    @examples
    @given(st.data())
    def check(data):
        for value, file, read in (
            (messages, "messages.json", read_messages),
            (questions, "questions.json", lambda path: read_questions(path.parent)),
        ):
            place, new = data.draw(st.sampled_from(list(paths_of(value)))), data.draw(ODD)
            (tmp_path / file).write_text(json.dumps(replaced(value, place, new)))
            outcome(lambda read=read, file=file: read(tmp_path / file))

    check()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff", "avif"])
def test_damaged_pictures(suffix, examples, tmp_path):
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    Image.linear_gradient("L").convert("RGB").resize((24, 16)).save(buffer, kind)
    path = tmp_path / f"a.{suffix}"

    @examples
    @given(damaged(buffer.getvalue()))
    def check(content):
        path.write_bytes(content)
        outcome(lambda: load_image(path))

    check()
