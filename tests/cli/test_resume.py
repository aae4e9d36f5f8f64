"""Exports that are interrupted or killed: what was finished is found again, and the bundle is the same."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_convert.quantization.stages import SEARCHED, SOLVED
from fastvlm_convert.user_cache import Kind
from tests.bundles import write_recipe
from tests.checkpoints import tree_state
from tests.cli.conftest import CHECKPOINT
from tests.planted import DEMO
from tests.quantization.calibrated import DECODER, INT8, calibrated_recipe

# The command line as it is, but a signal comes before some file in some folder is opened for writing.
INTERRUPTED = """
import os, signal, sys
from fastvlm_convert.cli.main import main

folder, number = sys.argv[1], int(sys.argv[3])
left = int(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

def watch(event, arguments):
    global left
    if event == "open" and folder in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

sys.addaudithook(watch)
raise SystemExit(main(sys.argv[4:]))
"""
KILLED, CTRL_C = (signal.SIGKILL, -9), (signal.SIGINT, 130)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def interrupted(folder: str, count: int, how: tuple[signal.Signals, int], *arguments: object) -> None:
    """Run a command that is interrupted before the `count`-th file in a folder."""
    words = [folder, count, how[0].value, *arguments]
    code = [sys.executable, "-c", INTERRUPTED, *map(str, words)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == how[1], done.stderr
    assert "Traceback" not in done.stderr


def kept(kind: Kind) -> dict[Path, int]:
    """Results of a kind that are whole, and the files that hold them."""
    pattern = f"[!.]*{kind.suffix or '/[!.]*.safetensors'}"
    return {path: path.stat().st_ino for path in kind.folder.glob(pattern)}


def content(folder: Path) -> dict[str, str]:
    return {name: digest for name, (digest, _) in tree_state(folder).items()}


def check_resumed(cli, cache, tmp_path, kind, arguments):
    """The same command finds what was finished, makes the rest, and its bundle is that of a whole run."""
    finished, output = kept(kind), tmp_path / "bundle"
    assert finished
    assert not output.exists()
    result = cli(*arguments, "-o", output, "--json")
    assert result.code == 0
    used = result.document["cache"][kind.name]
    assert used["found"] == len(finished)
    assert used["made"] > 0
    assert finished.items() < kept(kind).items()  # none was made anew
    assert len(kept(kind)) == used["found"] + used["made"]
    assert sorted(p.name for p in tmp_path.iterdir() if "bundle" in p.name) == ["bundle"]
    whole = tmp_path / "whole"
    assert cli(*arguments, "-o", whole, "--no-cache").code == 0
    assert content(output) == content(whole)
    again = cli(*arguments, "-o", output, "--overwrite")
    total = used["found"] + used["made"]
    (line,) = [line for line in again.out.splitlines() if line.startswith("found in the cache: ")]
    assert f"{total} of {total} results '{kind.name}'" in line


@pytest.mark.parametrize("how", [KILLED, pytest.param(CTRL_C, marks=pytest.mark.slow)])
def test_in_the_middle_of_the_search(cli, cache, tmp_path, how):
    arguments = ["export", DEMO, "--recipe", "int4", "--calibration", "none", "--target", "onnx"]
    interrupted(str(SEARCHED.folder), 20, how, *arguments, "-o", tmp_path / "bundle")
    assert len(kept(SEARCHED)) == 19
    check_resumed(cli, cache, tmp_path, SEARCHED, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("how", [KILLED, CTRL_C])
def test_in_the_middle_of_gptq(cli, cache, tmp_path, how):
    recipe = write_recipe(calibrated_recipe(DECODER, INT8, num_samples=2), tmp_path / "mine.yaml")
    arguments = ["export", CHECKPOINT, "--recipe", recipe, "--target", "coreml"]
    interrupted("/.decoder.layers.1.", 1, how, *arguments, "-o", tmp_path / "bundle")
    found = kept(SOLVED)
    assert found
    assert all(".layers.0." in path.name for path in found)
    check_resumed(cli, cache, tmp_path, SOLVED, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("how", [KILLED, CTRL_C])
def test_in_the_middle_of_writing(cli, cache, tmp_path, how):
    """The decoder is written last: the integers of everything before it need not be searched again."""
    arguments = ["export", DEMO, "--recipe", "int4", "--calibration", "none", "--target", "onnx"]
    interrupted(".bundle.partial/onnx/decoder", 1, how, *arguments, "-o", tmp_path / "bundle")
    check_resumed(cli, cache, tmp_path, SEARCHED, arguments)


def test_two_targets_count_a_result_once(cli, tmp_path):
    arguments = ["export", DEMO, "--recipe", "int4", "--calibration", "none", "--json"]
    both = cli(*arguments, "--target", "onnx", "--target", "mlx", "-o", tmp_path / "both").document["cache"]
    assert both == {"searched": {"found": 0, "made": len(kept(SEARCHED))}}
    one = cli(*arguments, "--target", "onnx", "-o", tmp_path / "one").document["cache"]
    assert one == {"searched": {"found": len(kept(SEARCHED)), "made": 0}}


def test_without_the_cache_nothing_is_found(cli, tmp_path):
    arguments = ["export", DEMO, "--recipe", "int4", "--calibration", "none", "--target", "onnx", "--json"]
    assert cli(*arguments, "-o", tmp_path / "one").document["cache"]["searched"]["made"] > 0
    assert cli(*arguments, "-o", tmp_path / "two", "--no-cache").document["cache"] == {}
