"""The folders of a bundle that hold MLX weights: what is in each, and what is said of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from fastvlm_convert.exporters.job import OnBytes, precisions_of
from fastvlm_convert.exporters.mlx.decoder import build_decoder
from fastvlm_convert.exporters.mlx.groups import in_groups, shared_group_size, stored_layers
from fastvlm_convert.exporters.mlx.support import AUTO_COMPUTE
from fastvlm_convert.exporters.mlx.vision import (
    APP_PROJECTOR,
    LIBRARY_PROJECTOR,
    build_projector,
    build_vision,
)
from fastvlm_convert.exporters.mlx.weights import Tensors, tensors
from fastvlm_convert.io_names import APPLE_FOLDER, COMPONENTS, Component
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.quantized.weight import AffineSource, MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig

FOLDER: Final = "mlx"
WEIGHTS: Final = "model.safetensors"


class Files(Protocol):
    """Where files of weights go."""

    def save(self, content: Sequence[Tensors], name: str) -> None:
        """Write a file of tensors."""
        ...


def lower(
    config: ModelConfig, weights: MixedSource, recipe: Recipe, files: Files, on_bytes: OnBytes
) -> list[Artifact]:
    """Write what mlx-vlm loads and, where the recipe asks for it, what Apple's app loads beside its encoder.

    Args:
        config: Dimensions.
        weights: Canonical names, folded, quantized where the recipe says so.
        recipe: Precisions and settings.
        files: Where files go.
        on_bytes: Called with the number of bytes of each weight written, counted as float32.

    Returns:
        One artifact a component and folder.
    """
    lowering = _Lowering(config, recipe, files)
    artifacts = lowering.library(in_groups(weights), on_bytes)
    if not recipe.coreml.drop_in:
        return artifacts
    size = shared_group_size(stored_layers(weights))
    app = in_groups(weights, () if size is None else (size,))
    return [*artifacts, *lowering.app(app, lambda count: None)]


@dataclass(frozen=True)
class _Lowering:
    """Writes folders; attributes as of `lower`."""

    config: ModelConfig
    recipe: Recipe
    files: Files

    def library(self, weights: AffineSource, on_bytes: OnBytes) -> list[Artifact]:
        named = [
            *build_vision(self.config.vision, weights, self.recipe.vision),
            *build_projector(LIBRARY_PROJECTOR, weights, self.recipe.vision),
            *build_decoder(weights, self.recipe),
        ]
        name = f"{FOLDER}/{WEIGHTS}"
        self.files.save([tensors(weight, on_bytes) for weight in named], name)
        return [self._artifact(component, weights, name) for component in COMPONENTS]

    def app(self, weights: AffineSource, on_bytes: OnBytes) -> list[Artifact]:
        """Without the encoder, which the app has in a package of Core ML; the projector is not in that."""
        named = [
            *build_projector(APP_PROJECTOR, weights, self.recipe.vision),
            *build_decoder(weights, self.recipe),
        ]
        name = f"{APPLE_FOLDER}/{WEIGHTS}"
        self.files.save([tensors(weight, on_bytes) for weight in named], name)
        return [self._artifact(component, weights, name) for component in ("embed", "decoder")]

    def _artifact(self, component: Component, weights: AffineSource, file: str) -> Artifact:
        recipe = self.recipe
        settings = recipe.vision if component == "vision" else recipe.decoder.on(AUTO_COMPUTE)
        return Artifact(
            target="mlx",
            component=component,
            storage=recipe.embed.storage if component == "embed" else settings.storage,
            compute=settings.compute,
            precision=precisions_of(weights, recipe, recipe.decoder.on(AUTO_COMPUTE))[component],
            files=(file,),
            inputs=(),
            outputs=(),
        )
