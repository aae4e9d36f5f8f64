"""`verify` warns where its pictures are of another kind than those that calibrated, and only there."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.recipe_settings import QuantizeRule
from tests.bundles import write_recipe
from tests.planted import DEMO
from tests.quantization.calibrated import DECODER, calibrated_recipe

WARNING = re.compile(
    r"these pictures are very unlike those that the weights were calibrated with: they drive (\d+)% .*"
    r"\(--calibration FOLDER\)"
)
# One layer is enough: what calibration saw does not depend on how many are solved.
ONE = replace(DECODER, layers=("decoder.layers.0.mlp.down_proj",), block_size=32)
FLOAT = QuantizeRule(("*",), "float")


@pytest.fixture
def settings(tmp_path) -> Path:
    recipe = replace(calibrated_recipe(ONE, FLOAT, num_samples=4, max_tokens=384), name="one")
    return write_recipe(recipe, tmp_path / "one.yaml")


@pytest.fixture
def few(tmp_path) -> Path:
    """Four of the demo's own pictures, with their questions."""
    folder = Path(shutil.copytree(DEMO / "check_images", tmp_path / "few"))
    listing = json.loads((folder / "questions.json").read_text())
    (folder / "questions.json").write_text(json.dumps(listing[:4]))
    return folder


def gray_noise(folder: Path) -> Path:
    """Four pictures of faint noise on gray, at which the demo's image tokens stay small."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(4):
        values = np.clip(127 + 30 * noise.normal(size=(200, 200, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    return folder


def warnings_of(cli, bundle: Path, pictures: Path) -> list[str]:
    result = cli("verify", bundle, "--reference", DEMO, "--images", pictures, "--record", "--json")
    warnings = result.document["warnings"]
    assert json.loads((bundle / "verification.json").read_text())["warnings"] == warnings
    return [warning for warning in warnings if WARNING.fullmatch(warning)]


def test_the_default_calibration_covers_the_demos_pictures(cli, tmp_path, settings, few):
    bundle = tmp_path / "bundle"
    assert cli("export", DEMO, "--recipe", settings, "--target", "onnx", "-o", bundle).code == 0
    assert warnings_of(cli, bundle, few) == []


def test_grossly_different_pictures(cli, tmp_path, settings, few):
    """Calibrated on faint noise: the demo's pictures are another kind, noise is not."""
    bundle, noise = tmp_path / "bundle", gray_noise(tmp_path / "noise")
    data = ("--calibration", noise, "--target", "onnx", "-o", bundle)
    assert cli("export", DEMO, "--recipe", settings, *data).code == 0
    assert warnings_of(cli, bundle, noise) == []
    (warning,) = warnings_of(cli, bundle, few)
    assert int(WARNING.fullmatch(warning)[1]) > 30
    assert "very unlike" in cli("verify", bundle, "--reference", DEMO, "--images", few).err
