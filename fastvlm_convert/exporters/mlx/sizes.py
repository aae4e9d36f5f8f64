"""Sizes of the MLX files: the exporter itself, run on weights that nobody reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fastvlm_convert.exporters.mlx.lower import lower
from fastvlm_convert.exporters.mlx.weights import Tensors
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.safetensors_file import Entries, lay_out

METADATA: Final = {"format": "mlx"}  # MLX's loaders then take names and layouts as they are


def mlx_dry_run(
    config: ModelConfig, weights: MixedSource, recipe: Recipe
) -> tuple[list[Artifact], dict[str, int]]:
    """What an export makes.

    Args:
        config: Dimensions.
        weights: Only shapes and schemes matter; nothing is read.
        recipe: Precisions and settings.

    Returns:
        The artifacts, and the bytes of every file of theirs by its path relative to the bundle.
    """
    files = _CountedFiles()
    artifacts = lower(config, weights, recipe, files, lambda count: None)
    return artifacts, files.sizes


def entries_of(content: Sequence[Tensors]) -> Entries:
    """All tensors of a file."""
    return {name: entry for weight in content for name, entry in weight.entries.items()}


class _CountedFiles:
    """Sizes of files that are not written."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def save(self, content: Sequence[Tensors], name: str) -> None:
        self.sizes[name] = lay_out(Path(name), entries_of(content), METADATA).size
