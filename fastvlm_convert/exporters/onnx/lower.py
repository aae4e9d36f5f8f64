"""The three graphs of a bundle: which they are, what they share, what they are called."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from fastvlm_convert.exporters.job import precision_of
from fastvlm_convert.exporters.onnx.data import DataFile
from fastvlm_convert.exporters.onnx.decoder import build_decoder
from fastvlm_convert.exporters.onnx.embed import Table, build_embed, store_table
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.vision import build_vision
from fastvlm_convert.io_names import Component, PrecisionName, onnx_data_name, onnx_file_name
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.quantized.weight import MixedSource, without_palettes
from fastvlm_convert.recipe import FloatSettings, Recipe
from fastvlm_convert.weights.model_config import ModelConfig

FOLDER = "onnx"


class Files(Protocol):
    """Where graphs and their data go."""

    def data(self, name: str) -> AbstractContextManager[DataFile]:
        """Begin a data file."""
        ...

    def save(self, graph: Graph, name: str) -> None:
        """Take a finished graph."""
        ...


class Lowering:
    """Builds the graphs of a bundle.

    Args:
        config: Dimensions, with the image size to export.
        weights: Canonical names, folded, quantized where the recipe says so.
        recipe: Precisions and settings.
        image_token_id: Clients look every id up, `<image>` too, which may lie beyond the checkpoint's table.
        files: Where graphs and data go.
        on_bytes: Called with the number of bytes of each weight written, counted as float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: MixedSource,
        recipe: Recipe,
        image_token_id: int,
        files: Files,
        on_bytes: Callable[[int], None],
    ) -> None:
        self.config = config
        self.weights = without_palettes(weights)
        self.recipe = recipe
        self.embed_rows = max(image_token_id + 1, config.decoder.embed_rows)
        self._files = files
        self._on_bytes = on_bytes

    def graphs(self) -> list[Artifact]:
        """Build all three; one artifact each."""
        return [self._vision(), *self._decoder_and_embed()]

    def _vision(self) -> Artifact:
        settings = self.recipe.vision
        precision = self._precision("vision")
        file = onnx_file_name("vision", precision)
        with self._data(file) as data:
            graph = Graph("fastvlm_vision", data, settings.storage, settings.compute, self._on_bytes)
            build_vision(graph, self.config, self.weights)
            self._files.save(graph, file)
        return _artifact("vision", settings, precision, graph, file, onnx_data_name(file))

    def _decoder_and_embed(self) -> list[Artifact]:
        settings, decoder = self.recipe.decoder, self.config.decoder
        precision = self._precision("decoder")
        file = onnx_file_name("decoder", precision)
        shared = decoder.tied and self.recipe.onnx.shared_table
        head = self.weights["decoder.embed_tokens.weight" if decoder.tied else "decoder.lm_head.weight"]
        with self._data(file) as data:
            graph = Graph(
                "fastvlm_decoder",
                data,
                settings.storage,
                settings.compute,
                self._on_bytes,
                self.recipe.onnx.accuracy_level,
            )
            table = store_table(graph, head, self.embed_rows if shared else decoder.vocab_size)
            build_decoder(graph, decoder, self.weights, self.recipe.common.max_context_length, table)
            self._files.save(graph, file)
            decoder_artifact = _artifact("decoder", settings, precision, graph, file, onnx_data_name(file))
            return [self._embed(data, table) if shared else self._embed_apart(), decoder_artifact]

    def _embed_apart(self) -> Artifact:
        file = onnx_file_name("embed", self._precision("embed"))
        with self._data(file) as data:
            return self._embed(data, None)

    def _embed(self, data: DataFile, table: Table | None) -> Artifact:
        """The embedding over a table that is there already, or over its own, written to `data`."""
        storage, precision = self.recipe.embed.storage, self._precision("embed")
        file = onnx_file_name("embed", precision)
        graph = Graph("fastvlm_embed", data, storage, "float32", self._on_bytes)
        if table is None:
            table = store_table(graph, self.weights["decoder.embed_tokens.weight"], self.embed_rows)
        build_embed(graph, table, self.embed_rows, self.config.decoder.hidden_size)
        self._files.save(graph, file)
        settings = FloatSettings(storage, "float32")
        return _artifact("embed", settings, precision, graph, file, table.location)

    def _data(self, file: str) -> AbstractContextManager[DataFile]:
        return self._files.data(onnx_data_name(file))

    def _precision(self, component: Component) -> PrecisionName:
        return precision_of(component, self.weights, self.recipe)


def _artifact(
    component: Component, settings: FloatSettings, precision: PrecisionName, graph: Graph, *files: str
) -> Artifact:
    return Artifact(
        target="onnx",
        component=component,
        storage=settings.storage,
        compute=settings.compute,
        precision=precision,
        files=tuple(f"{FOLDER}/{file}" for file in files),
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
    )
