"""Sizes of the ONNX files: the exporter itself, run on weights that nobody reads."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastvlm_convert.exporters.onnx.data import CountedData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.lower import FOLDER, ModelInputs, lower
from fastvlm_convert.exporters.onnx.proto_size import graph_bytes
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig


def onnx_dry_run(
    config: ModelConfig, weights: MixedSource, recipe: Recipe, inputs: ModelInputs
) -> tuple[list[Artifact], dict[str, int]]:
    """What an export makes, found without loading onnx.

    Args:
        config: Dimensions, with the image size to export.
        weights: Only shapes and schemes matter; nothing is read.
        recipe: Precisions and settings.
        inputs: What the model is given.

    Returns:
        The artifacts, and the bytes of every file of theirs by its path relative to the bundle.
    """
    files = _CountedFiles()
    artifacts = lower(config, weights, recipe, files, lambda count: None, inputs)
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
