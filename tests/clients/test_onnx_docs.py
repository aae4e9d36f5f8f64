"""docs/onnx.md: its Python runs as it stands, and answers as `run` does."""

import re
from pathlib import Path

import pytest

from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe, without_data
from fastvlm_convert.runtime.loaded import load_bundle
from tests.commands import ROOT

DEMO = ROOT / "checkpoints" / "fastvlm-demo"
PAGE = ROOT / "docs" / "onnx.md"
PLAIN, GENAI = re.findall(
    r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
QUESTIONS = ("Describe the image.", "How many shapes are there?")


@pytest.fixture(params=["fp16", pytest.param("android-int4", marks=pytest.mark.slow)])
def folder(request, tmp_path, monkeypatch) -> Path:
    """A folder as the page has it: a bundle, whose cache is float16 or float32, and a picture."""
    settings = without_data(load_recipe(request.param))
    export(DEMO, tmp_path / "bundle", recipe=settings, targets=["onnx"])
    image = load_image(DEMO / "check_images" / "00.png")
    image.crop((0, 20, image.width, image.height)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected(folder: Path) -> list[str]:
    loaded = load_bundle(folder / "bundle", "onnx")
    return ["".join(loaded.ask(folder / "photo.jpg", question)) for question in QUESTIONS]


def test_plain_onnx_runtime(folder, capsys):
    names: dict = {}
    exec(compile(PLAIN, PAGE, "exec"), names)
    answers = expected(folder)
    assert capsys.readouterr().out == f"{answers[0]}\n"
    assert [names["answer"]("photo.jpg", question) for question in QUESTIONS] == answers
    assert names["answer"]("photo.jpg", QUESTIONS[0], 3) in answers[0]


def test_onnx_runtime_genai(folder, capsys):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    names: dict = {}
    exec(compile(PLAIN, PAGE, "exec"), names)
    capsys.readouterr()
    exec(compile(GENAI, PAGE, "exec"), names)
    answers = expected(folder)
    assert capsys.readouterr().out == answers[0]
    assert ["".join(names["stream"]("photo.jpg", question)) for question in QUESTIONS] == answers
