"""The Core ML backend's record; loads no library."""

from collections.abc import Sequence
from typing import Final

from fastvlm_convert.exporters.backends import Backend, Prediction
from fastvlm_convert.exporters.coreml.card import card_section
from fastvlm_convert.exporters.coreml.sizes import coreml_dry_run
from fastvlm_convert.exporters.coreml.support import AUTO_COMPUTE, check
from fastvlm_convert.exporters.job import Statement
from fastvlm_convert.io_names import APPLE_FOLDER
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig


def _predict(
    config: ModelConfig, weights: MixedSource, recipe: Recipe, statement: Statement | None
) -> Prediction:
    artifacts, sizes = coreml_dry_run(config, weights, recipe, statement)
    return Prediction(sizes, artifacts)


def _working_bytes(config: ModelConfig, recipe: Recipe, layers: Sequence[LayerPlan]) -> int:
    """The largest weight, which coremltools wants whole: floats in float32, an integer in a byte."""
    del config, recipe
    return max(plan.size * (1 if plan.scheme else 4) for plan in layers)


BACKEND: Final = Backend(
    title="Core ML",
    libraries=("coremltools",),
    writer="fastvlm_convert.exporters.coreml.write",
    export="export_coreml",
    check=check,
    predict=_predict,
    base_bytes=340_000_000,  # coremltools loads torch where it is installed
    working_bytes=_working_bytes,
    auto_compute=AUTO_COMPUTE,
    has_float16_cache=lambda recipe: recipe.coreml.kv_cache == "state",
    app_folders=lambda config, recipe, layers: {APPLE_FOLDER: {}} if recipe.coreml.drop_in else {},
    folders=("coreml", APPLE_FOLDER),
    store="background-assets",
    card_library="coreml",
    card_section=card_section,
)
