"""The Python API as users meet it: cheap to import, never shadowed, and as its page says."""

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm_convert
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.manifest import FILE_NAME
from fastvlm_convert.questions import read_questions
from fastvlm_convert.recipe import without_data
from tests.test_architecture import HEAVY, heavy_modules_after

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "checkpoints" / "fastvlm-demo"
PAGE = ROOT / "docs" / "python.md"
PUBLIC = ["export", "load_bundle", "load_recipe", "open_checkpoint", "plan", "quantize", "verify"]


def test_importing_is_cheap():
    loaded = "import sys, fastvlm_convert; dir(fastvlm_convert)"
    assert heavy_modules_after(loaded) == set()
    code = f"{loaded}; sys.stdout.write(' '.join(m for m in sys.modules if m.startswith('fastvlm_convert')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "fastvlm_convert"


def test_planning_loads_no_heavy_library():
    code = f"import fastvlm_convert; fastvlm_convert.plan({str(DEMO)!r}, recipe='int4')"
    assert heavy_modules_after(code) == set(), HEAVY


def test_what_is_public():
    assert fastvlm_convert.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(fastvlm_convert))
    with pytest.raises(AttributeError, match="module 'fastvlm_convert' has no attribute 'convert'"):
        _ = fastvlm_convert.convert
    assert (Path(fastvlm_convert.__file__).parent / "py.typed").is_file()


@pytest.fixture(scope="module")
def every_module() -> None:
    """All of them imported, as an application may have done."""
    for module in pkgutil.walk_packages(fastvlm_convert.__path__, "fastvlm_convert."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two pictures to compare on."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("00.png", "01.png"):
        shutil.copy(DEMO / "check_images" / name, folder)
    return folder


@pytest.mark.usefixtures("every_module")
def test_no_module_shadows_a_function(tmp_path, pictures):
    api = fastvlm_convert
    assert [name for name in PUBLIC if not callable(getattr(api, name))] == []
    checkpoint = api.open_checkpoint(str(DEMO))
    recipe = without_data(api.load_recipe("int4"))
    planned = api.plan(checkpoint, recipe=recipe, targets=["onnx"])
    stages = set()
    quantized = api.quantize(
        checkpoint, str(tmp_path / "int4"), recipe=recipe, on_progress=lambda stage, share: stages.add(stage)
    )
    assert stages == {"hashes", "weights"}
    result = api.export(quantized.output, tmp_path / "bundle", targets="onnx")
    assert planned.files == {name: entry.size for name, entry in result.manifest.files.items()}
    model = api.load_bundle(str(result.bundle))
    images = sorted(pictures.iterdir())
    for given in (images[0], images, None):
        pieces = list(model.ask(given, "Describe the image.", max_new_tokens=4))
        assert pieces
        assert all(isinstance(piece, str) for piece in pieces)
    verified = api.verify(str(result.bundle), DEMO, questions=read_questions(pictures, 1))
    assert (verified.status, verified.num_questions) == ("passed", 1)


def test_targets_are_those_of_phones_by_default_and_none_is_left_out_silently():
    assert fastvlm_convert.plan(DEMO, recipe="fp16").plan.targets == ("onnx", "coreml")
    assert fastvlm_convert.plan(DEMO, recipe="fp16", targets=iter(["coreml"])).plan.targets == ("coreml",)
    twice = ["coreml", "onnx", "coreml"]
    assert fastvlm_convert.plan(DEMO, recipe="fp16", targets=twice).plan.targets == ("coreml", "onnx")
    with pytest.raises(TargetError, match="ONNX has no look-up of weights"):
        fastvlm_convert.plan(DEMO, recipe="ios-ane")
    with pytest.raises(TargetError, match="unknown target 'tpu'") as caught:
        fastvlm_convert.plan(DEMO, recipe="fp16", targets="tpu")
    assert caught.value.hint == "targets: onnx, coreml, mlx"


def test_recipes_by_name_file_or_object(tmp_path):
    by_name = fastvlm_convert.plan(str(DEMO), recipe="int8").files
    file = ROOT / "configs" / "int8.yaml"
    assert fastvlm_convert.plan(DEMO, recipe=file).files == by_name
    assert fastvlm_convert.plan(DEMO, recipe=fastvlm_convert.load_recipe(str(file))).files == by_name
    with pytest.raises(RecipeError, match="a float checkpoint needs a recipe"):
        fastvlm_convert.export(DEMO, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def blocks(page: Path) -> list[str]:
    """Every Python block of a page, behind as many empty lines as put it in its own place."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text.count("\n", 0, match.start(1)) + match[1]
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def test_the_page_runs_as_it_stands(tmp_path, pictures, monkeypatch, capsys):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    shutil.copytree(pictures, tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks(PAGE)
    for block in found:
        exec(compile(block, PAGE, "exec"), names)
    assert len(found) == 10
    shown = capsys.readouterr().out
    assert "onnx: done\n" in shown
    assert "\npassed\n" in shown
    assert "ONNX has no look-up of weights" in shown
    assert (tmp_path / "demo-fp16" / FILE_NAME).is_file()
