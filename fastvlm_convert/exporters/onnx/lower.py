"""The graphs of a bundle: which they are, what they share, what they are called."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final, Protocol, Self

from fastvlm_convert.exporters.job import OnBytes, precisions_of
from fastvlm_convert.exporters.onnx.data import DataFile
from fastvlm_convert.exporters.onnx.decoder import build_decoder
from fastvlm_convert.exporters.onnx.embed import Table, build_embed, store_table
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.merge import build_merge
from fastvlm_convert.exporters.onnx.support import AUTO_COMPUTE
from fastvlm_convert.exporters.onnx.vision import build_vision
from fastvlm_convert.io_names import (
    MERGE,
    Component,
    PrecisionName,
    onnx_data_name,
    onnx_file_name,
    onnx_merge_name,
)
from fastvlm_convert.manifest import Artifact, Contract
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.quantized.weight import MixedSource, without_palettes
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import FloatSettings
from fastvlm_convert.weights.model_config import ModelConfig

FOLDER: Final = "onnx"


@dataclass(frozen=True)
class ModelInputs:
    """What a model is given, as far as graphs depend on it.

    Attributes:
        image_token_id: Clients look every id up, `<image>` too, which may lie beyond the checkpoint's table.
        images: How pictures are prepared.
    """

    image_token_id: int
    images: ImageSettings

    @classmethod
    def of(cls, contract: Contract) -> Self:
        """What a bundle's contract says of them."""
        return cls(contract.image_token_id, contract.images)


class Files(Protocol):
    """Where graphs and their data go."""

    def data(self, name: str) -> AbstractContextManager[DataFile]:
        """Begin a data file."""
        ...

    def save(self, graph: Graph, name: str) -> None:
        """Take a finished graph."""
        ...


def lower(
    config: ModelConfig,
    weights: MixedSource,
    recipe: Recipe,
    files: Files,
    on_bytes: OnBytes,
    inputs: ModelInputs,
) -> list[Artifact]:
    """Build the graphs of a bundle, one after the other.

    Args:
        config: Dimensions, with the image size to export.
        weights: Canonical names, folded, quantized where the recipe says so.
        recipe: Precisions and settings.
        files: Where graphs and data go.
        on_bytes: Called with the number of bytes of each weight written, counted as float32.
        inputs: What the model is given.

    Returns:
        One artifact a graph.
    """
    weights = without_palettes(weights)
    precisions = precisions_of(weights, recipe, recipe.decoder.on(AUTO_COMPUTE))
    lowering = _Lowering(config, weights, recipe, files, on_bytes, inputs, precisions)
    return [lowering.vision(), *lowering.decoder_and_embed()]


@dataclass(frozen=True)
class _Lowering:
    """Builds graphs; attributes as of `lower`, and what each component's precision is called."""

    config: ModelConfig
    weights: MixedSource
    recipe: Recipe
    files: Files
    on_bytes: OnBytes
    inputs: ModelInputs
    precisions: Mapping[Component, PrecisionName]

    @property
    def embed_rows(self) -> int:
        """Rows of the table: clients look `<image>` up before they overwrite what they get."""
        return max(self.inputs.image_token_id + 1, self.config.decoder.embed_rows)

    def vision(self) -> Artifact:
        settings, file = self.recipe.vision, self._file("vision")
        with self.files.data(onnx_data_name(file)) as data:
            graph = Graph("fastvlm_vision", data, settings.storage, settings.compute, self.on_bytes)
            graph.folds_weights = self.recipe.onnx.vision_weights == "folded"
            images = self.inputs.images if self.recipe.onnx.preprocessing == "in_graph" else None
            build_vision(graph, self.config, self.weights, images)
            self.files.save(graph, file)
        return self._artifact("vision", settings, graph, file, onnx_data_name(file))

    def decoder_and_embed(self) -> list[Artifact]:
        settings, file = self.recipe.decoder.on(AUTO_COMPUTE), self._file("decoder")
        decoder = self.config.decoder
        level = self.recipe.onnx.accuracy_level
        shared = decoder.tied and self.recipe.onnx.shared_table
        head = self.weights["decoder.embed_tokens.weight" if decoder.tied else "decoder.lm_head.weight"]
        with self.files.data(onnx_data_name(file)) as data:
            graph = Graph("fastvlm_decoder", data, settings.storage, settings.compute, self.on_bytes, level)
            table = store_table(graph, head, self.embed_rows if shared else decoder.vocab_size)
            build_decoder(graph, decoder, self.weights, self.recipe, table)
            self.files.save(graph, file)
            artifact = self._artifact("decoder", settings, graph, file, onnx_data_name(file))
            return [*(self._embed(data, table) if shared else self._embed_apart()), artifact]

    def _embed_apart(self) -> list[Artifact]:
        with self.files.data(onnx_data_name(self._file("embed"))) as data:
            return self._embed(data, None)

    def _embed(self, data: DataFile, table: Table | None) -> list[Artifact]:
        """The two embeddings over a table that is there already, or over their own, written to `data`."""
        settings, file = FloatSettings(self.recipe.embed.storage, "float32"), self._file("embed")
        graph = Graph("fastvlm_embed", data, settings.storage, settings.compute, self.on_bytes)
        if table is None:
            table = store_table(graph, self.weights["decoder.embed_tokens.weight"], self.embed_rows)
        shape = (self.embed_rows, self.config.decoder.hidden_size)
        build_embed(graph, table, shape)
        self.files.save(graph, file)
        artifact = self._artifact("embed", settings, graph, file, table.location)
        file = onnx_merge_name(file)
        graph = Graph("fastvlm_merge", data, settings.storage, settings.compute, self.on_bytes)
        build_merge(graph, table, shape, self.inputs.image_token_id)
        self.files.save(graph, file)
        merge = self._artifact("embed", settings, graph, file, table.location)
        return [artifact, replace(merge, function=MERGE)]

    def _file(self, component: Component) -> str:
        return onnx_file_name(component, self.precisions[component])

    def _artifact(self, component: Component, settings: FloatSettings, graph: Graph, *files: str) -> Artifact:
        return Artifact(
            target="onnx",
            component=component,
            storage=settings.storage,
            compute=settings.compute,
            precision=self.precisions[component],
            files=tuple(f"{FOLDER}/{file}" for file in files),
            inputs=tuple(graph.inputs),
            outputs=tuple(graph.outputs),
        )
