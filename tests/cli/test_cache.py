"""`cache show`, `cache clear` and `--no-cache`."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvlm_convert.evaluation.journal import JOURNALS
from fastvlm_convert.float16.report import RANGES
from fastvlm_convert.quantization.stages import ANSWERS, SEARCHED, SOLVED
from fastvlm_convert.user_cache import Kind, cache_folder
from tests.bundles import write_recipe
from tests.checkpoints import tree_state
from tests.cli.conftest import CHECKPOINT
from tests.quantization.calibrated import DECODER, INT8, calibrated_recipe

KINDS = (SEARCHED, ANSWERS, SOLVED, RANGES, JOURNALS)
OLD = Kind("answers", "", (0,), ".npz")
HOLD = """
import sys, time
from pathlib import Path
from fastvlm_convert.user_cache import hold

print(hold(Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(kind: Kind, digit: str = "a", days: float = 0.0, size: int = 1000) -> Path:
    """A result that was used some days ago."""
    path = kind.path(digit * kind.digits)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not kind.suffix:
        path.mkdir()
    file = path if kind.suffix else path / "decoder.layers.0.mlp.up_proj.safetensors"
    file.write_bytes(bytes(size))
    for each in {file, path}:
        os.utime(each, (time.time() - 86400 * days,) * 2)
    return path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_nothing_is_kept(cli, cache):
    shown = cli("cache", "show")
    assert (shown.code, shown.out) == (0, f"{cache}\nnothing is kept there\n")
    assert "FASTVLM_CONVERT_CACHE moves it" in shown.err
    assert cli("cache", "clear").out == "nothing was removed\n"
    assert not cache.exists()


def test_what_a_calibrated_run_keeps(cli, tmp_path, cache):
    recipe = write_recipe(calibrated_recipe(DECODER, INT8, num_samples=2), tmp_path / "mine.yaml")
    assert cli("quantize", CHECKPOINT, "--recipe", recipe, "-o", tmp_path / "q").code == 0
    document = cli("cache", "show", "--json").document
    assert document["folder"] == str(cache)
    assert {name: kind["count"] for name, kind in document["kinds"].items()} == {
        "searched": 2, "answers": 1, "solved": 1, "fp16-range": 0, "evaluations": 0
    }  # fmt: skip
    assert document["total_bytes"] == sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
    of = {entry["kind"]: (entry["checkpoint"], entry["recipe"]) for entry in document["entries"]}
    assert of == {
        "searched": (None, None), "answers": ("checkpoint", None), "solved": ("checkpoint", "calibrated")
    }  # fmt: skip
    assert all(entry["age_days"] < 1 and not entry["stale"] for entry in document["entries"])
    lines = cli("cache", "show").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["kind", "searched", "answers", "solved", "total"]
    assert lines[4].endswith("layers solved with data: checkpoint (calibrated)")
    stale = cli("cache", "clear", "--stale")
    assert stale.out == "nothing was removed\n"
    cleared = cli("cache", "clear", "--json").document  # this very process still uses the solved layers
    assert [entry["kind"] for entry in cleared["removed"]] == ["searched", "searched", "answers"]
    (kept,) = cleared["kept"]
    assert kept["reason"] == "in use by a running process"


def test_all_goes_or_some_kinds_or_what_is_old(cli, cache):
    paths = {kind.name: put(kind) for kind in KINDS}
    old = put(ANSWERS, "b", days=40)
    cleared = cli("cache", "clear", "--older-than", 30)
    assert "answers: 1 result, 1.0 kB" in cleared.out
    assert f"removed 1.0 kB from {cache}" in cleared.out
    assert not old.exists()
    assert all(path.exists() for path in paths.values())
    assert cli("cache", "clear", "searched", "fp16-range", "--quiet").out == "2.0 kB\n"
    assert [name for name, path in paths.items() if path.exists()] == ["answers", "solved", "evaluations"]
    assert len(cli("cache", "clear", "--json").document["removed"]) == 3
    assert files(cache) == set()


def test_what_was_used_lately_is_not_old(cli, tmp_path):
    recipe = write_recipe(calibrated_recipe(DECODER, INT8, num_samples=2), tmp_path / "mine.yaml")
    assert cli("quantize", CHECKPOINT, "--recipe", recipe, "-o", tmp_path / "q").code == 0
    for path in (p for kind in (ANSWERS, SOLVED) for p in [*kind.folder.rglob("*")]):
        os.utime(path, (0, 0))
    assert {e["kind"] for e in shown(cli) if e["age_days"] > 300} == {"answers", "solved"}
    assert cli("quantize", CHECKPOINT, "--recipe", recipe, "-o", tmp_path / "again").code == 0
    assert {e["kind"] for e in shown(cli) if e["age_days"] > 300} == {"answers"}


def shown(cli) -> list[dict[str, object]]:
    return cli("cache", "show", "--json").document["entries"]


def test_what_other_versions_made_is_stale(cli, cache):
    current = put(ANSWERS, "c")
    earlier = put(OLD)
    later = put(Kind("answers", "", (999,), ".npz"))
    unversioned = cache / "solved" / ("d" * 64)
    unversioned.mkdir(parents=True)
    (unversioned / "answers.json").write_text("{}")
    left = ANSWERS.folder / f".{'e' * 64}.123.partial.npz"
    left.write_bytes(b"half")
    assert {Path(e["path"]) for e in shown(cli) if e["stale"]} == {earlier, unversioned, left}
    assert cli("cache", "clear", "--stale").code == 0
    assert current.exists()
    assert later.exists()
    assert files(cache) == {str(path.relative_to(cache)) for path in (current, later)}


def test_an_unknown_kind(cli):
    result = cli("cache", "clear", "answer")
    assert result.code == 2
    assert "there is no kind 'answer'" in result.err
    assert "did you mean 'answers'?" in result.err


def test_what_is_not_ours_stays(cli, cache, tmp_path):
    """In folders that a user gave by mistake, or somebody filled on purpose."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{'a' * 64}.npz").write_text("photo")
    put(SEARCHED)
    (SEARCHED.folder / "notes.txt").write_text("mine")
    (SEARCHED.folder / f"{'b' * 64}.bin").symlink_to(outside / f"{'a' * 64}.npz")
    (SEARCHED.folder / f"{'c' * 64}.bin").mkdir()
    os.mkfifo(SEARCHED.folder / f"{'d' * 64}.bin")
    (cache / "answers").symlink_to(outside)
    (cache / "photos").mkdir()
    (cache / "photos" / f"{'a' * 64}.npz").write_text("photo")
    solved = put(SOLVED)
    (solved / "\x1b[31mthesis.txt").write_text("mine")
    linked = SOLVED.folder / ("e" * 64)
    linked.symlink_to(outside)
    document = cli("cache", "clear", "--json").document
    assert [entry["kind"] for entry in document["removed"]] == ["searched"]
    assert "there is something else in it" in document["kept"][0]["reason"]
    text = cli("cache", "clear")
    assert (text.code, "\x1b[31m" in text.err + text.out) == (0, False)
    assert (outside / f"{'a' * 64}.npz").read_text() == "photo"
    assert (cache / "photos" / f"{'a' * 64}.npz").exists()
    assert {p.name for p in SEARCHED.folder.iterdir()} == {
        "notes.txt", f"{'b' * 64}.bin", f"{'c' * 64}.bin", f"{'d' * 64}.bin"
    }  # fmt: skip
    assert len(list(solved.iterdir())) == 2


def test_a_hostile_note_is_only_text(cli):
    solved = put(SOLVED)
    (solved / "about.json").write_text(json.dumps({"checkpoint": "\x1b[31m[bold]x", "recipe": ["no"]}))
    result = cli("cache", "show")
    assert result.code == 0
    assert "\\x1b[31m[bold]x" in result.out
    for text in ("", "[]", '"x"', "{", "\x00"):
        (solved / "about.json").write_text(text)
        assert cli("cache", "show", "--json").document["entries"][0]["checkpoint"] is None


def test_layers_that_a_running_process_uses_stay(cli, cache):
    used, unused = put(SOLVED, "a"), put(SOLVED, "b")
    process = subprocess.Popen([sys.executable, "-c", HOLD, used], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        result = cli("cache", "clear")
        assert (result.code, used.exists(), unused.exists()) == (0, True, False)
        assert f"{used} stays: in use by a running process" in result.err.replace("\n", "")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert cli("cache", "clear").code == 0
    assert not used.exists()


def test_a_journal_and_a_file_in_the_making_stay(cli, cache):
    journal = put(JOURNALS)
    lock = journal.with_suffix(".lock")
    half = SEARCHED.folder / f".{'a' * 64}.1.partial.bin"
    half.parent.mkdir(parents=True)
    with lock.open("w") as first, half.open("w") as second:
        for file in (first, second):
            fcntl.flock(file, fcntl.LOCK_EX)
        kept = cli("cache", "clear", "--json").document["kept"]
        assert {Path(k["path"]) for k in kept} == {journal, half}
    cli("cache", "clear")
    assert files(cache) == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(cli, cache):
    path = put(ANSWERS)
    path.parent.chmod(0o500)
    try:
        result = cli("cache", "clear", "--json")
        assert (result.code, result.document["status"]) == (2, "not_run")
        assert result.document["kept"] == [{"path": str(path), "reason": "Permission denied"}]
    finally:
        path.parent.chmod(0o700)


def test_a_file_in_the_place_of_the_folder(cli, cache):
    cache.write_text("")
    for command in ("show", "clear"):
        result = cli("cache", command)
        assert result.code == 2
        assert "the cache is no folder" in result.err


class TestNoCache:
    @pytest.fixture
    def recipe(self, tmp_path) -> Path:
        return write_recipe(calibrated_recipe(DECODER, INT8, num_samples=2), tmp_path / "mine.yaml")

    @pytest.mark.parametrize("command", ["quantize", "export"])
    def test_it_is_neither_read_nor_written(self, cli, tmp_path, cache, recipe, command):
        target = ("--target", "coreml") if command == "export" else ()
        arguments = (command, CHECKPOINT, *target, "--recipe", recipe, "-o")
        assert cli(*arguments, tmp_path / "a", "--no-cache").code == 0
        assert not cache.exists()
        assert cli(*arguments, tmp_path / "b").code == 0
        for path in (p for p in cache.rglob("*") if p.is_file()):
            path.write_bytes(b"wrong")
        before = tree_state(cache)
        assert cli(*arguments, tmp_path / "c", "--no-cache").code == 0
        assert tree_state(cache) == before
        made = [{n: digest for n, (digest, _) in tree_state(tmp_path / name).items()} for name in "abc"]
        assert made[0] == made[1] == made[2]
        assert cache_folder() == cache

    def test_verify_solves_again(self, cli, tmp_path, cache, pictures, recipe):
        made = ("export", CHECKPOINT, "--target", "coreml", "--recipe", recipe, "-o", tmp_path / "a")
        assert cli(*made, "--calibration", pictures).code == 0
        arguments = ("verify", tmp_path / "a", "--reference", CHECKPOINT, "--images", pictures)
        result = cli(*arguments, "--no-cache")
        assert result.code == 2
        assert "calibrated with data that is not at hand" in result.err

    def test_evaluate_keeps_no_journal(self, cli, cache, fp32_bundle):
        arguments = ("evaluate", fp32_bundle, "--dataset", "demo", "--limit", 2, "--max-new-tokens", 1)
        assert cli(*arguments, "--no-cache").code == 0
        assert not cache.exists()
