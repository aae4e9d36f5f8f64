"""The bundles that the graphs are taken from: every precision, layout and way to store the table."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.runtime.loaded import LoadedModel, load_reference
from tests.bundles import FP16, FP32, export_bundle, recipe
from tests.checkpoints import (
    GOLDEN,
    HF,
    LLAVA,
    SHARDED,
    copy_checkpoint,
    edit_json,
    edit_tensors,
    read_tensors,
)


@dataclass(frozen=True)
class Variant:
    """A bundle with what it was made from."""

    name: str
    checkpoint: Path
    settings: Recipe
    bundle: Path

    def reference(self) -> LoadedModel:
        """The torch reference at the bundle's image size."""
        size = self.settings.common.image_size
        opened = open_checkpoint(self.checkpoint)
        images = opened.pictures.image
        return load_reference(opened, images if size == "checkpoint" else replace(images, size=size))


def golden(name: str) -> Callable[[Path], Path]:
    return lambda folder: GOLDEN / name / "checkpoint"


def untied(folder: Path) -> Path:
    """bfloat16 shards with a head of its own; read as heads of 16, which ONNX Runtime can execute."""
    checkpoint = copy_checkpoint(SHARDED, folder)
    edit_json(checkpoint / "config.json", {"num_attention_heads": 7, "num_key_value_heads": 1})
    return checkpoint


def cut(folder: Path) -> Path:
    """Tables as long as the tokenizer, as Apple's loader saves them: none has a row for `<image>`."""
    checkpoint = copy_checkpoint(LLAVA, folder)
    rows = read_tensors(checkpoint)["model.embed_tokens.weight"][:432]
    edit_tensors(checkpoint, {"model.embed_tokens.weight": rows})
    return checkpoint


MIXED = recipe(
    FP32,
    vision={"storage": "float16"},
    embed={"storage": "float16"},
    onnx={"shared_table": False},
    common={"image_size": 320, "max_context_length": 128},
)
VARIANTS: dict[str, tuple[Callable[[Path], Path], Recipe]] = {
    "fp32": (golden(LLAVA), recipe(FP32)),
    "fp16": (golden(LLAVA), recipe(FP16)),
    "hf": (golden(HF), recipe(FP32)),
    "own_table": (golden(LLAVA), recipe(FP32, onnx={"shared_table": False})),
    "untied": (untied, recipe(FP32)),
    "cut": (cut, recipe(FP32)),
    "mixed": (golden(LLAVA), MIXED),
}
GetVariant = Callable[[str], Variant]


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> GetVariant:
    """Variants by name, each exported once."""
    made: dict[str, Variant] = {}

    def get(name: str) -> Variant:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make, settings = VARIANTS[name]
            checkpoint = make(folder)
            made[name] = Variant(
                name, checkpoint, settings, export_bundle(checkpoint, folder / "bundle", settings)
            )
        return made[name]

    return get


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, variants: GetVariant) -> Variant:
    """Every variant in turn."""
    return variants(request.param)
