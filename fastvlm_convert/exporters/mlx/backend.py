"""The MLX backend's record; needs no library."""

from collections.abc import Sequence
from typing import Final

from fastvlm_convert.errors import TargetError
from fastvlm_convert.exporters.backends import Backend, Prediction
from fastvlm_convert.exporters.job import Statement
from fastvlm_convert.exporters.mlx.card import card_section
from fastvlm_convert.exporters.mlx.folders import app_folders
from fastvlm_convert.exporters.mlx.groups import stored_layers
from fastvlm_convert.exporters.mlx.lower import FOLDER
from fastvlm_convert.exporters.mlx.sizes import mlx_dry_run
from fastvlm_convert.exporters.mlx.support import AUTO_COMPUTE, check, notes
from fastvlm_convert.io_names import APPLE_FOLDER
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.source import CHUNK_BYTES


def _predict(
    config: ModelConfig, weights: MixedSource, recipe: Recipe, statement: Statement | None
) -> Prediction:
    image_token_id = statement.contract.image_token_id if statement else 0
    if recipe.coreml.drop_in and image_token_id >= config.decoder.embed_rows:
        raise TargetError(
            f"Apple's app looks '<image>' (id {image_token_id}) up in the embedding, which has "
            f"{config.decoder.embed_rows} rows",
            hint="save the checkpoint with a row for it (resize_token_embeddings), or set coreml.drop_in "
            "to false",
        )
    artifacts, sizes = mlx_dry_run(config, weights, recipe)
    return Prediction(sizes, artifacts, tuple(notes(config, recipe, stored_layers(weights))))


def _working_bytes(config: ModelConfig, recipe: Recipe, layers: Sequence[LayerPlan]) -> int:
    """A part of a weight in float32, its integers and what is written of them."""
    del config, recipe, layers
    return 4 * CHUNK_BYTES


BACKEND: Final = Backend(
    title="MLX",
    libraries=(),
    writer="fastvlm_convert.exporters.mlx.write",
    export="export_mlx",
    check=check,
    predict=_predict,
    base_bytes=75_000_000,
    working_bytes=_working_bytes,
    auto_compute=AUTO_COMPUTE,
    has_float16_cache=lambda recipe: False,
    app_folders=app_folders,
    folders=(FOLDER, APPLE_FOLDER),
    store="background-assets",
    card_library="mlx",
    card_section=card_section,
)
