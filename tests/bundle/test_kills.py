"""Runs that are killed, and what they leave damaged: the next run's result is the same, or a clear error."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_convert.bundle.folder import new_folder
from fastvlm_convert.bundle.resumable import partial_folder
from fastvlm_convert.errors import OutputError
from fastvlm_convert.pipeline import QuantizeResult, export, quantize
from tests.bundles import export_bundle, mixed_recipe, recipe
from tests.checkpoints import GOLDEN, LLAVA, tree_state
from tests.kills import changes, kill_before
from tests.quantization.calibrated import DECODER, INT8, calibrated_recipe

pytestmark = pytest.mark.slow
CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
PROGRESS = "fastvlm-convert.progress"


def content(folder: Path) -> dict[str, str]:
    return {name: digest for name, (digest, _) in tree_state(folder).items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(output: Path, overwrite: bool = False) -> QuantizeResult:
    return quantize(CHECKPOINT, output, recipe=mixed_recipe(), overwrite=overwrite)


def points(first: int, last: int, total: int, request: pytest.FixtureRequest) -> list[int]:
    """Changes to be killed before: some at the start and at the end and two between, or all of them."""
    if request.config.getoption("--soak"):
        return list(range(1, total + 1))
    return [*range(1, first + 1), total // 3, total // 2, *range(total - last + 1, total + 1)]


def test_quantize_goes_on_wherever_it_was_killed(tmp_path, golden_quantized, request):
    total = changes(tmp_path, lambda: make(tmp_path / "whole"))
    assert content(tmp_path / "whole") == content(golden_quantized)
    for number in points(4, 3, total, request):
        output = tmp_path / str(number) / "out"
        kill_before(number, tmp_path, lambda output=output: make(output))
        if output.exists():  # killed after the last rename: only what its making needed is left beside it
            with pytest.raises(OutputError, match="the output exists"):
                make(output)
        else:
            assert (make(output).num_resumed > 0) == (number >= total // 3), number
        assert content(output) == content(golden_quantized), number
        assert names(output.parent) == ["out"], number


def test_the_old_checkpoint_is_there_or_the_new_one_wherever_it_was_killed(
    tmp_path, golden_quantized, request
):
    def replace(folder: Path) -> None:
        make(folder / "out", overwrite=True)

    def old(folder: Path) -> dict[str, str]:
        shutil.copytree(golden_quantized, folder / "out")
        record = folder / "out" / "quantized.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"tool": "old"}))
        return content(folder / "out")

    before = old(tmp_path / "whole")
    total = changes(tmp_path, lambda: replace(tmp_path / "whole"))
    for number in points(0, 6, total, request):
        folder = tmp_path / str(number)
        old(folder)
        kill_before(number, tmp_path, lambda folder=folder: replace(folder))
        if (folder / "out").exists():
            there = content(folder / "out")
            assert there == before or there.items() >= content(golden_quantized).items(), number
        else:
            assert content(partial_folder(folder / "out") / "fastvlm-convert.replaced") == before, number
            with pytest.raises(OutputError, match="the output exists"):  # it was put back
                make(folder / "out")
            assert content(folder / "out") == before
        replace(folder)
        assert content(folder / "out") == content(golden_quantized), number
        assert names(folder) == ["out"], number


def test_a_bundle_is_old_or_new_wherever_its_export_was_killed(tmp_path, request):
    old = export_bundle(CHECKPOINT, tmp_path / "old", recipe("fp32"))
    new = export_bundle(CHECKPOINT, tmp_path / "new", recipe("fp16"))
    folder = tmp_path / "here"

    def replace() -> tuple[str, ...]:
        made = export(CHECKPOINT, folder / "bundle", recipe=recipe("fp16"), targets="onnx", overwrite=True)
        return made.warnings

    shutil.copytree(old, folder / "bundle")
    total = changes(folder, replace)
    said = set()
    for number in points(3, 14, total, request):
        shutil.rmtree(folder)
        shutil.copytree(old, folder / "bundle")
        kill_before(number, folder, replace)
        if (folder / "bundle").exists():
            there = content(folder / "bundle")
            assert there == content(old) or there.items() >= content(new).items(), number
        said |= {text.replace(str(folder), "") for text in replace()}
        assert content(folder / "bundle") == content(new), number
        assert names(folder) == ["bundle"], number
    assert "removed what an interrupted run had left in /.bundle.partial" in said
    assert "an interrupted run had moved /bundle away; it was put back" in said


def test_an_export_finds_what_it_had_solved_before_it_was_killed(tmp_path, monkeypatch, request):
    """Answers, solved layers, and integers found without data, each of which appears whole or not at all."""
    settings = calibrated_recipe(DECODER, INT8, num_samples=2)
    cache = tmp_path / "cache"

    def make(output: Path) -> None:
        export(CHECKPOINT, output, recipe=settings, targets="coreml")

    def kept() -> dict[Path, int]:
        ends = (".safetensors", ".npz", ".bin")
        return {p: p.stat().st_ino for p in cache.rglob("[!.]*") if p.suffix in ends}

    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(cache))
    total = changes(cache, lambda: make(tmp_path / "whole"))
    num_results = len(kept())
    found = set()
    for number in points(1, 1, total, request):
        shutil.rmtree(cache)
        kill_before(number, cache, lambda: make(tmp_path / "killed"))
        assert not (tmp_path / "killed").exists()
        before = kept()
        found.add(len(before))
        make(tmp_path / "killed")
        after = kept()
        assert len(after) == num_results
        assert before.items() <= after.items(), number  # nothing is made anew that was there
        assert content(tmp_path / "killed") == content(tmp_path / "whole"), number
        shutil.rmtree(tmp_path / "killed")
    assert len(found) >= 3  # killed early, late and between


def test_the_second_of_two_exports_says_so_at_once(tmp_path):
    with new_folder(tmp_path / "bundle", False, []) as folder:
        (folder / "a").write_text("first")
        with pytest.raises(OutputError, match="another run is working here"):
            export_bundle(CHECKPOINT, tmp_path / "bundle")
        assert names(folder) == ["a", PROGRESS]
    assert names(tmp_path / "bundle") == ["a"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The folder of a run that was killed in the middle; copy it."""
    folder = tmp_path_factory.mktemp("interrupted")
    kill_before(60, folder, lambda: make(folder / "out"))
    return folder


def damage(file: str, change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def plant(partial: Path) -> None:
        data = bytearray((partial / file).read_bytes())
        changed = change(data)
        (partial / file).write_bytes(changed if isinstance(changed, bytes | bytearray) else data)

    return plant


def lines(change: Callable[[list[bytes]], object]) -> Callable[[Path], None]:
    def plant(partial: Path) -> None:
        found = (partial / PROGRESS).read_bytes().splitlines(keepends=True)
        change(found)
        (partial / PROGRESS).write_bytes(b"".join(found))

    return plant


def swap(file: str, link: bool, hard: bool = False) -> Callable[[Path], None]:
    """Put a link to something precious in the place of a file."""

    def plant(partial: Path) -> None:
        precious = partial.parent / "precious"
        shutil.copy(partial / file, precious)
        (partial / file).unlink()
        (partial / file).hardlink_to(precious) if hard else (partial / file).symlink_to(precious)

    return plant


WEIGHTS = "model.safetensors"
SAME = {  # the result is the same
    "cut in half": damage(WEIGHTS, lambda d: d[: len(d) // 2]),
    "one byte short": damage(WEIGHTS, lambda d: d[:-1]),
    "one byte more": damage(WEIGHTS, lambda d: d + b"\0"),
    "empty": damage(WEIGHTS, lambda d: b""),
    "zeros": damage(WEIGHTS, lambda d: bytes(len(d))),
    "zeros behind the header": damage(WEIGHTS, lambda d: d[:9000] + bytes(len(d) - 9000)),
    "another header": damage(WEIGHTS, lambda d: d.__setitem__(20, d[20] ^ 1)),
    "another first byte": damage(WEIGHTS, lambda d: d.__setitem__(0, d[0] ^ 1)),
    "a sparse file": lambda p: os.truncate(p / WEIGHTS, 0) or os.truncate(p / WEIGHTS, 400_000),
    "no weights": lambda p: (p / WEIGHTS).unlink(),
    "a note cut off": damage(PROGRESS, lambda d: d[:-5]),
    "a note with other figures": lines(lambda f: f.__setitem__(-1, f[-1].replace(b"0.", b"1."))),
    "a note with another hash": lines(lambda f: f.__setitem__(-1, f[-1][:-9] + b"0" + f[-1][-8:])),
    "a note left out": lines(lambda f: f.pop(10)),
    "a note twice": lines(lambda f: f.insert(10, f[10])),
    "notes in another order": lines(lambda f: f.insert(5, f.pop(10))),
    "zeros behind the notes": damage(PROGRESS, lambda d: d + bytes(512)),
    "an empty folder": lambda p: (p / "empty").mkdir(),
}
REFUSED = {  # an error, and nothing is touched
    "a file of the user": lambda p: (p / "notes.txt").write_text("mine"),
    "a folder of the user": lambda p: (p / "mine").mkdir() or (p / "mine" / "a").write_text("mine"),
    "a link for the weights": swap(WEIGHTS, link=True),
    "a hard link for the weights": swap(WEIGHTS, link=True, hard=True),
    "a folder for the weights": lambda p: (p / WEIGHTS).unlink() or (p / WEIGHTS / "a").mkdir(parents=True),
    "a link for the settings": lambda p: (p / "config.json").symlink_to("../precious"),
    "progress that is another file": damage(PROGRESS, lambda d: b"mine"),
    "no progress": lambda p: (p / PROGRESS).unlink(),
    "a link for the progress": swap(PROGRESS, link=True),
    "the first note damaged": lines(lambda f: f.__setitem__(1, b"x" + f[1])),
}


@pytest.mark.parametrize("case", SAME)
def test_damage_is_noticed_and_made_good(interrupted, golden_quantized, tmp_path, case):
    folder = Path(shutil.copytree(interrupted, tmp_path / "work"))
    SAME[case](folder / "out.partial")
    make(folder / "out")
    assert content(folder / "out") == content(golden_quantized)
    assert names(folder) == ["out"]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_its_own_work_is_refused(interrupted, tmp_path, case):
    folder = Path(shutil.copytree(interrupted, tmp_path / "work"))
    REFUSED[case](folder / "out.partial")
    before = tree_state(folder)
    with pytest.raises(OutputError, match=r"beside its own files|is in the way") as caught:
        make(folder / "out")
    assert caught.value.hint
    assert tree_state(folder) == before


def test_that_it_was_made_good_is_said(interrupted, tmp_path):
    folder = Path(shutil.copytree(interrupted, tmp_path / "work"))
    SAME["cut in half"](folder / "out.partial")
    result = make(folder / "out")
    assert result.num_resumed == 0
    (said,) = [text for text in result.warnings if "interrupted" in text]
    assert said.endswith("weights that an interrupted run had written were damaged and were written again")


def test_any_damaged_byte_is_noticed(interrupted, golden_quantized, tmp_path, request):
    """Bytes anywhere in what an interrupted run left: the same result, or an error; never another result."""
    expected = content(golden_quantized)
    refused = 0
    attempts = 400 if request.config.getoption("--soak") else 12
    for seed in range(attempts):
        rng = random.Random(seed)
        folder = Path(shutil.copytree(interrupted, tmp_path / str(seed)))
        path = folder / "out.partial" / rng.choice([WEIGHTS, PROGRESS])
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 1, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        try:
            make(folder / "out")
        except OutputError:
            refused += 1
        else:
            assert content(folder / "out") == expected, seed
        shutil.rmtree(folder)
    assert refused < attempts
