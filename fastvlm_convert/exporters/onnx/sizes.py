"""Sizes of the ONNX files: the exporter itself, run on weights that nobody reads."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastvlm_convert.exporters.onnx.data import CountedData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.lower import FOLDER, Lowering
from fastvlm_convert.exporters.onnx.proto_size import graph_bytes
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig


def onnx_dry_run(
    config: ModelConfig, weights: MixedSource, recipe: Recipe, image_token_id: int
) -> tuple[list[Artifact], dict[str, int]]:
    """Artifacts that an export makes, and bytes of every file of theirs, by its path relative to the bundle.

    Args:
        config: Dimensions, with the image size to export.
        weights: Only shapes and schemes matter; of tensors that are large nothing is read.
        recipe: Precisions and settings.
        image_token_id: The table has a row for it.
    """
    files = _CountedFiles()
    artifacts = Lowering(config, weights, recipe, image_token_id, files, lambda count: None).graphs()
    return artifacts, {f"{FOLDER}/{name}": size for name, size in files.sizes.items()}


class _CountedFiles:
    """Sizes of files that are not written."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    @contextmanager
    def data(self, name: str) -> Iterator[CountedData]:
        counted = CountedData(name)
        yield counted
        self.sizes[name] = counted.size

    def save(self, graph: Graph, name: str) -> None:
        self.sizes[name] = graph_bytes(graph)
