import json

import pytest

from fastvlm_convert.cli.main import main
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.recipe_settings import RepairSettings
from tests.checkpoints import GOLDEN, LLAVA, edit_tensors, read_tensors

IMAGES = str(GOLDEN / LLAVA)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))


def scan(*arguments: object) -> int:
    return main(["scan", *map(str, arguments), "--images", IMAGES, "--max-new-tokens", "2"])


def test_a_recipe_with_repairs_is_written(llava, tmp_path, capsys):
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(llava, {name: read_tensors(llava)[name] * 3e4})
    output = tmp_path / "mine.yaml"
    assert scan(llava, "--recipe", "fp16", "-o", output, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (repair,) = document["repairs"]
    assert repair["setting"] == "residual_shift"
    assert document["recipe"] == str(output)
    made = load_recipe(str(output))
    assert made.name == "mine"
    assert made.repairs == RepairSettings(residual_shift=repair["value"])
    assert made.decoder == load_recipe("fp16").decoder
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["mine.yaml"]
    bundle = str(tmp_path / "bundle")
    assert main(["export", str(llava), "--target", "onnx", "--recipe", str(output), "-o", bundle]) == 0
    assert "range scan" not in capsys.readouterr().err


def test_without_need_it_says_so(llava, capsys):
    assert scan(llava) == 0
    assert "recipe fp16 needs no repairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.yaml", "the output exists"),
        ("mine.json", "a recipe is a .yaml file"),
        ("missing/mine.yaml", "there is no such folder"),
    ],
)
def test_where_it_cannot_be_written(name, message, llava, tmp_path, capsys):
    (tmp_path / "there.yaml").write_text("name: mine")
    assert scan(llava, "-o", tmp_path / name) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.yaml").read_text() == "name: mine"


def test_an_unknown_recipe(llava, capsys):
    assert scan(llava, "--recipe", "fp15") == 2
    assert "unknown recipe 'fp15'" in capsys.readouterr().err
