"""The ONNX backend's record; loads no library."""

from collections.abc import Sequence
from typing import Final

from fastvlm_convert.exporters.backends import Backend, Prediction
from fastvlm_convert.exporters.job import Statement
from fastvlm_convert.exporters.onnx.card import card_section
from fastvlm_convert.exporters.onnx.genai import genai_files
from fastvlm_convert.exporters.onnx.lower import ModelInputs
from fastvlm_convert.exporters.onnx.sizes import onnx_dry_run
from fastvlm_convert.exporters.onnx.support import AUTO_COMPUTE, check, check_pictures
from fastvlm_convert.exporters.onnx.transformers_js import transformers_js_config
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.parts import is_language


def _predict(
    config: ModelConfig, weights: MixedSource, recipe: Recipe, statement: Statement | None
) -> Prediction:
    if statement is None:
        inputs = ModelInputs(0, ImageSettings(config.vision.image_size, "pad"))
    else:
        inputs = ModelInputs.of(statement.contract)
    artifacts, sizes = onnx_dry_run(config, weights, recipe, inputs)
    return Prediction(sizes, artifacts)


def _working_bytes(config: ModelConfig, recipe: Recipe, layers: Sequence[LayerPlan]) -> int:
    """The rotary tables, made in float64, or the encoder's largest layer: weights are streamed."""
    angles = 3 * 8 * recipe.common.max_context_length * config.decoder.head_dim // 2
    encoder = 3 * max(plan.size for plan in layers if not is_language(plan.layer))
    return max(angles, encoder)


BACKEND: Final = Backend(
    title="ONNX",
    libraries=("onnx",),
    writer="fastvlm_convert.exporters.onnx.write",
    export="export_onnx",
    check=check,
    predict=_predict,
    base_bytes=70_000_000,
    working_bytes=_working_bytes,
    auto_compute=AUTO_COMPUTE,
    has_float16_cache=lambda recipe: False,
    client_config=transformers_js_config,
    check_pictures=check_pictures,
    client_documents=genai_files,
    folders=("onnx",),
    store="play",
    card_library="transformers.js",
    card_section=card_section,
)
