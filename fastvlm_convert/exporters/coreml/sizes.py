"""Sizes of the Core ML packages: the exporter itself, run on weights that nobody reads."""

from typing import Final

from fastvlm_convert.exporters.coreml.graph import Graph
from fastvlm_convert.exporters.coreml.lower import lower
from fastvlm_convert.exporters.coreml.metadata import Metadata, description_of, features_of, metadata_of
from fastvlm_convert.exporters.coreml.paths import FILES, package_manifest
from fastvlm_convert.exporters.coreml.proto_size import package_bytes
from fastvlm_convert.exporters.job import Statement
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig

# What a package says of the model (license, prompt, end tokens) is known only with the checkpoint. Without
# one, there is about as much text as this, in a program of a hundred thousand bytes.
_DETAILS: Final = {"": " " * 290}
_LICENSE: Final = " " * 5000


def coreml_dry_run(
    config: ModelConfig, weights: MixedSource, recipe: Recipe, statement: Statement | None
) -> tuple[list[Artifact], dict[str, int]]:
    """What an export makes, found without loading coremltools.

    Args:
        config: Dimensions, with the image size to export.
        weights: Only shapes and schemes matter; nothing is read.
        recipe: Precisions and settings.
        statement: What the packages say of the model; None where that is not known.

    Returns:
        The artifacts, and the bytes of every file of theirs by its path relative to the bundle: exact, but
        without a statement those of `model.mlmodel` are off by some thousand.

    Raises:
        RecipeError: A pattern of float32_ops matches no operation.
    """
    files = _CountedFiles(recipe, statement)
    artifacts = lower(config, weights, recipe, files, lambda count: None)
    return artifacts, files.sizes


class _CountedFiles:
    """Sizes of packages that are not written."""

    def __init__(self, recipe: Recipe, statement: Statement | None) -> None:
        self.sizes: dict[str, int] = {}
        self._recipe = recipe
        self._statement = statement

    def save(self, graphs: list[Graph], name: str) -> None:
        if self._statement is None:
            metadata = Metadata(description_of(name), _LICENSE, _DETAILS, features_of(name))
        else:
            metadata = metadata_of(name, self._statement, self._recipe)
        sizes = (len(package_manifest(b"")), *package_bytes(graphs, metadata))
        self.sizes |= {f"{name}/{file}": size for file, size in zip(FILES, sizes, strict=True)}
