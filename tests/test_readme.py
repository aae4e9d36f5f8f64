"""The front page keeps its word: its commands run on the demo checkpoint, its sizes are those of the tool."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_convert.cli.main import main
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.predict.recipe_sizes import describe
from fastvlm_convert.recipe import load_recipe, shipped_recipes
from tests.commands import README, ROOT, TOOL, shell_blocks

DEMO = ROOT / "checkpoints" / "fastvlm-demo"
BLOCKS = shell_blocks(README)
RUN_HERE = [command for block in BLOCKS if not block.needs_network for command in block.commands]
# Options that make minutes seconds: no calibration, one picture, one trial.
SHORT = {
    "export": ("--calibration", "none"),
    "quantize": ("--calibration", "none"),
    "verify": ("--images", "photos"),
    "bench": ("--trials", "1", "--new-tokens", "2"),
    "scan": ("--max-new-tokens", "4"),
}
BUNDLES = {
    "ios-bundle": ("ios-int4", "coreml"),
    "android-bundle": ("android-int4", "onnx"),
    "repaired-bundle": ("repaired", "coreml"),
    "uncalibrated-bundle": ("int4", "onnx"),
}


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder as a reader has it after the download; the demo checkpoint stands in for FastVLM-0.5B."""
    shutil.copytree(DEMO, tmp_path / "FastVLM-0.5B")
    picture = DEMO / "check_images" / "00.png"
    (tmp_path / "photos").mkdir()
    shutil.copy(picture, tmp_path / "photos")
    Image.open(picture).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_all(capsys: pytest.CaptureFixture[str], short: bool) -> dict[tuple[str, ...], str]:
    """Run every command of the page that needs no network, in order; what each printed."""
    printed = {}
    for command in RUN_HERE:
        assert command[0] == TOOL, f"{command[0]} needs the network, or is no command of ours: mark its block"
        file = command[-1] if ">" in command else None
        argv = command[1:-2] if file else command[1:]
        code = main([*argv, *(SHORT.get(argv[0], ()) if short else ())])
        output = capsys.readouterr()
        assert code == 0, f"{' '.join(command)}\n{output.out}\n{output.err}"
        if file:
            Path(file).write_text(output.out)
        printed[command] = output.out
        assert output.out, command
    return printed


def check_results(printed: dict[tuple[str, ...], str], folder: Path) -> None:
    for name, (recipe, target) in BUNDLES.items():
        manifest = load_manifest(folder / name)
        assert (manifest.recipe.name, manifest.targets) == (recipe, (target,)), name
    assert all("passed on " in out for command, out in printed.items() if command[1] == "verify")
    answers = {out.splitlines()[0] for command, out in printed.items() if command[1] == "run"}
    assert len(answers) == 1  # the bundle's is the checkpoint's


def test_its_commands_run_on_the_demo(reader, capsys):
    check_results(run_all(capsys, short=True), reader)


@pytest.mark.slow
def test_its_commands_run_on_the_demo_as_they_stand(reader, capsys):
    check_results(run_all(capsys, short=False), reader)


def test_the_blocks_that_need_the_network_are_these():
    marked = [" ".join(command) for block in BLOCKS if block.needs_network for command in block.commands]
    assert marked == [
        "make demo",
        "pip install .[all]",
        "hf download apple/FastVLM-0.5B --local-dir FastVLM-0.5B",
        "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        "make demo PIP_ARGS=--extra-index-url https://download.pytorch.org/whl/cpu",
    ]
    assert len(RUN_HERE) > 12


def test_hf_takes_the_options_it_is_given():
    """huggingface_hub comes with tokenizers, and its `hf` with it."""
    done = subprocess.run(
        [Path(sys.executable).parent / "hf", "download", "--help"], capture_output=True, text=True, check=True
    )
    assert "--local-dir" in done.stdout


def test_the_sizes_of_its_recipes_are_right():
    rows = re.findall(
        r"^\|[^|]*\| `([\w-]+)` \| ([\d-]+)(?: MB)? \| ([\d-]+)(?: MB)? \|$", README.read_text(), re.M
    )
    assert sorted(name for name, *_ in rows) == sorted(shipped_recipes())
    for name, *stated in rows:
        facts = describe(load_recipe(name)).targets
        for target, size in zip(("onnx", "coreml"), stated, strict=True):
            assert size == "-" or int(size) == round(facts[target].bytes / 1e6), (name, target)
        assert set(stated) != {"-"}
