"""Small real bundles, and the means to plant what a rule is about."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from fastvlm_convert.lint.platform import ANYWHERE, Platform
from fastvlm_convert.lint.run import lint
from fastvlm_convert.manifest import FILE_NAME
from fastvlm_convert.mil.proto import model
from fastvlm_convert.outcomes import Outcome
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from tests.bundles import copy_bundle, edit_manifest, recipe
from tests.checkpoints import GOLDEN, LLAVA

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
PROGRAM = "coreml/{}.mlpackage/Data/com.apple.CoreML/model.mlmodel"

Make = Callable[..., Path]


def integers(scheme: str = "int4", block_size: int | str = 16, **sections: dict[str, Any]) -> Recipe:
    """A recipe with integers in the decoder and in its table."""
    rules = (QuantizeRule(("decoder.*",), scheme, block_size), QuantizeRule(("*",), "float"))
    return replace(recipe("int4", **sections), quantize=rules)


def palettes(bits: int = 4, channel_scale: bool = False) -> Recipe:
    """A recipe with palettes in the decoder."""
    rules = (
        QuantizeRule(("decoder.embed_tokens", "decoder.lm_head"), "int8"),
        QuantizeRule(("decoder.*",), f"palette{bits}", group_size=8, channel_scale=channel_scale),
        QuantizeRule(("*",), "float"),
    )
    return replace(recipe("ios-ane"), quantize=rules)


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Bundles of the golden checkpoint by target and recipe, each made once; copy one before changing it."""
    made: dict[str, Path] = {}

    def bundle(target: str, settings: Recipe) -> Path:
        key = json.dumps([target, settings.to_dict()])
        if key not in made:
            folder = tmp_path_factory.mktemp("lint") / "bundle"
            export(CHECKPOINT, folder, recipe=settings, targets=[target])
            made[key] = folder
        return made[key]

    return bundle


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A bundle that a test may change."""
    return lambda bundle: copy_bundle(bundle, tmp_path)


def found(bundle: Path, rule: str, platform: Platform = ANYWHERE) -> list[Outcome]:
    """What breaks a rule; the rule must apply."""
    result = lint(bundle, platform)
    outcomes = [outcome for outcome in result.outcomes if outcome.id == rule]
    assert outcomes, f"{rule} does not apply"
    assert all(outcome.status != "not_run" for outcome in outcomes)
    return [outcome for outcome in outcomes if outcome.status == "failed"]


def applies(bundle: Path, rule: str, platform: Platform) -> bool:
    """Whether a rule applies."""
    return rule not in lint(bundle, platform).not_applicable


def resized(bundle: Path, name: str) -> None:
    """Tell the manifest of a file's new size."""
    size = (bundle / name).stat().st_size
    edit_manifest(bundle, lambda m: m["files"][name].update(size=size))


def edit_graph(bundle: Path, component: str, change: Callable[[onnx.ModelProto], object]) -> None:
    """Let `change` alter a graph."""
    value = json.loads((bundle / FILE_NAME).read_text())
    artifacts = [a for a in value["artifacts"] if (a["target"], a["component"]) == ("onnx", component)]
    name = artifacts[0]["files"][0]
    graph = onnx.load(bundle / name, load_external_data=False)
    change(graph)
    (bundle / name).write_bytes(graph.SerializeToString())
    resized(bundle, name)


def edit_program(bundle: Path, component: str, change: Callable[[Any], object]) -> None:
    """Let `change` alter a Core ML model."""
    name = PROGRAM.format(component)
    program = model.Model.FromString((bundle / name).read_bytes())
    change(program)
    (bundle / name).write_bytes(program.SerializeToString())
    resized(bundle, name)
