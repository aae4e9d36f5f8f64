"""The packages of a bundle: which they are, what their functions are called, what these share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fastvlm_convert.exporters.coreml.decoder import build_decoder
from fastvlm_convert.exporters.coreml.embed import build_embed
from fastvlm_convert.exporters.coreml.graph import Constant, Graph, check_patterns
from fastvlm_convert.exporters.coreml.paths import APPLE_PACKAGE, DECODER_PACKAGE, FILES, VISION_PACKAGE
from fastvlm_convert.exporters.coreml.support import AUTO_COMPUTE
from fastvlm_convert.exporters.coreml.values import FLEXIBLE
from fastvlm_convert.exporters.coreml.vision import build_apple_vision, build_vision
from fastvlm_convert.exporters.job import OnBytes, precisions_of
from fastvlm_convert.io_names import (
    DECODE,
    EMBED,
    PREFILL,
    Component,
    PrecisionName,
    TensorSpec,
    precision_name,
)
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.quantized.weight import MixedSource, dense_view
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import FloatSettings
from fastvlm_convert.weights.model_config import ModelConfig

_MAIN = "main"


class Files(Protocol):
    """Where packages go."""

    def save(self, graphs: list[Graph], name: str) -> None:
        """Take the finished graphs of a package; the first is the one that runs when none is named."""
        ...


def lower(
    config: ModelConfig, weights: MixedSource, recipe: Recipe, files: Files, on_bytes: OnBytes
) -> list[Artifact]:
    """Build the packages of a bundle, one after the other.

    Args:
        config: Dimensions, with the image size to export.
        weights: Canonical names, folded, quantized where the recipe says so.
        recipe: Precisions and settings.
        files: Where packages go.
        on_bytes: Called with the number of bytes of each weight written, counted as float32.

    Returns:
        One artifact a function.
    """
    lowering = _Lowering(config, weights, recipe, files, on_bytes)
    artifacts = [*lowering.vision(), *lowering.decoder_and_embed()]
    return [*artifacts, *lowering.apple_vision()] if recipe.coreml.drop_in else artifacts


@dataclass(frozen=True)
class _Lowering:
    """Builds packages; attributes as of `lower`."""

    config: ModelConfig
    weights: MixedSource
    recipe: Recipe
    files: Files
    on_bytes: OnBytes

    def vision(self) -> list[Artifact]:
        settings = self.recipe.vision
        graph = Graph(_MAIN, {}, settings, self.on_bytes, widest=self.widest)
        build_vision(graph, self.config, self.weights, self.recipe)
        check_patterns("vision", [graph])
        self.files.save([graph], VISION_PACKAGE)
        return self._artifacts(VISION_PACKAGE, settings, {"vision": [graph]})

    def decoder_and_embed(self) -> list[Artifact]:
        settings, coreml, decoder = self.decoder, self.recipe.coreml, self.config.decoder
        constants: dict[str, Constant] = {}
        lengths = {DECODE: FLEXIBLE}
        if coreml.sequence_lengths == "fixed":
            lengths = {DECODE: 1, PREFILL: coreml.prefill_chunk}
        steps = [self._graph(name, constants) for name in lengths]
        for graph, tokens in zip(steps, lengths.values(), strict=True):
            build_decoder(graph, decoder, self.weights, self.recipe, tokens)
        embed = self._graph(EMBED, constants)
        build_embed(embed, self.weights["decoder.embed_tokens.weight"], coreml.prefill_chunk)
        check_patterns("decoder", [*steps, embed])
        self.files.save([*steps, embed], DECODER_PACKAGE)
        return self._artifacts(DECODER_PACKAGE, settings, {"decoder": steps, "embed": [embed]})

    @property
    def widest(self) -> float:
        limit = self.recipe.coreml.split_wider_than
        return math.inf if limit == "never" else limit

    @property
    def decoder(self) -> FloatSettings:
        return self.recipe.decoder.on(AUTO_COMPUTE)

    def _graph(self, name: str, constants: dict[str, Constant]) -> Graph:
        """A function of the decoder."""
        return Graph(name, constants, self.decoder, self.on_bytes, widest=self.widest)

    def apple_vision(self) -> list[Artifact]:
        """The encoder alone, in the form that Apple's app loads: float32 at its borders and inside."""
        settings = FloatSettings(self.recipe.vision.storage, "float32")
        graph = Graph(_MAIN, {}, settings, lambda count: None, "iOS16")
        floats = dense_view(self.weights)  # integers in blocks need iOS 18
        build_apple_vision(graph, self.config, floats)
        self.files.save([graph], APPLE_PACKAGE)
        return self._artifacts(APPLE_PACKAGE, settings, {"vision": [graph]})

    def _artifacts(
        self, package: str, settings: FloatSettings, graphs: Mapping[Component, list[Graph]]
    ) -> list[Artifact]:
        return [
            Artifact(
                target="coreml",
                component=component,
                storage=settings.storage,
                compute=settings.compute,
                precision=self._precision(component, package),
                files=tuple(f"{package}/{file}" for file in FILES),
                inputs=_input_specs(graph),
                outputs=_output_specs(graph),
                function=graph.name,
            )
            for component, of_component in graphs.items()
            for graph in of_component
        ]

    def _precision(self, component: Component, package: str) -> PrecisionName:
        if package == APPLE_PACKAGE:
            return precision_name(self.recipe.vision.storage, "float32", None)
        return precisions_of(self.weights, self.recipe, self.decoder)[component]


def _input_specs(graph: Graph) -> tuple[TensorSpec, ...]:
    """What a function takes, states last."""
    states = [given.spec for given in graph.inputs if given.kind == "state"]
    return tuple([given.spec for given in graph.inputs if given.kind != "state"] + states)


def _output_specs(graph: Graph) -> tuple[TensorSpec, ...]:
    """What a function gives; no shape where a call decides it."""
    return tuple(
        TensorSpec(value.name, value.dtype, () if FLEXIBLE in value.shape else value.shape)
        for value in graph.outputs
    )
