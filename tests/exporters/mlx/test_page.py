"""What docs/mlx.md says of sizes, of a recipe for Apple's app, and of the demo's encoder."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.errors import TargetError
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.predict.sizes import predict_artifacts
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.recipe import Recipe, load_recipe
from fastvlm_convert.weights.published import published_config

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "mlx.md").read_text(encoding="utf-8")
_SIZE = r" \| (\S+)(?: MB)?"
ROWS = re.findall(rf"^\| (`.*?){_SIZE * 4} \|$", PAGE, re.M)


def described(row: str) -> Recipe:
    """The recipe of a row, with Apple's folder."""
    name = row.split("`")[1]
    plain: dict[str, Any] = load_recipe(name).to_dict()
    if "the section above" in row:
        (section,) = re.findall(r"```yaml\n(quantize:.*?)```", PAGE, re.DOTALL)
        plain |= yaml.safe_load(section)
    base = from_plain(Recipe, plain)
    return replace(base, coreml=replace(base.coreml, drop_in=True))


def sizes(size: str, settings: Recipe) -> Mapping[str, int]:
    config = published_config(size)
    plans = plan_layers({n: w.shape for n, w in placeholder_weights(config, ()).items()}, settings)
    backend_of("mlx").check(config, settings, plans)
    found = predict_artifacts(config, plans, settings, ["mlx"]).sizes
    return {name.split("/")[0]: round(size / 1e6) for name, size in found.items()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_sizes(row):
    name, library, *apps = row
    settings = described(name)
    for size, stated in zip(("0.5b", "1.5b", "7b"), apps, strict=True):
        if stated == "refused":
            with pytest.raises(TargetError, match="Apple's app takes integers of one width"):
                sizes(size, settings)
        else:
            assert sizes(size, settings)["apple-app"] == int(stated)
    alone = replace(settings, coreml=replace(settings.coreml, drop_in=False))
    assert sizes("0.5b", alone) == {"mlx": int(library)}


def test_every_row_is_read():
    assert [row[0] for row in ROWS] == ["`fp16`", "`int8`", "`int4`", "`int4` with the section above"]


def test_the_constants_are_the_demos():
    stages = open_checkpoint(ROOT / "checkpoints" / "fastvlm-demo").config.vision.stages
    assert f"VisionConfig.layers = {[stage.depth for stage in stages]}" in PAGE
    assert f"VisionConfig.embed_dims = {[stage.width for stage in stages]}" in PAGE
