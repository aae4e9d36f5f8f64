"""What everything outside a backend's own folders knows about it: one record each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fastvlm_convert.errors import MissingDependencyError
from fastvlm_convert.exporters.job import ExportJob, ModelInputs
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.targets import BACKENDS, Target, known_target
from fastvlm_convert.weights.model_config import ModelConfig

Export = Callable[[ExportJob], list[Artifact]]


@dataclass(frozen=True)
class Prediction:
    """What an export will write.

    Attributes:
        sizes: Bytes of every graph, program and weight file, by its path relative to the bundle.
        artifacts: What the files hold, as the export itself will say.
    """

    sizes: Mapping[str, int]
    artifacts: Sequence[Artifact]


def no_client_config(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """Of a backend whose clients look nothing up in config.json."""
    del artifacts
    return {}


def takes_all_pictures(recipe: Recipe, images: ImageSettings) -> None:
    """Of a backend that leaves pictures to its clients, or can prepare them in every way."""
    del recipe, images


def no_app_folder(recipe: Recipe) -> None:
    """Of a backend without an app that reads a folder of its own."""
    del recipe


@dataclass(frozen=True)
class Backend:
    """A format that a model can be exported to.

    Nothing here loads the format's libraries but `exporter`.

    Attributes:
        title: What people call it.
        libraries: Packages whose versions shape its bytes.
        writer: Module that has `export`.
        export: Name of the function there that writes a job's files and returns its artifacts.
        check: Refuses dimensions, settings and schemes that it cannot take, with a TargetError that says what
            is allowed.
        predict: What an export of weights without content will write.
        base_bytes: Memory of an export before a weight is read.
        working_bytes: Memory beside that while weights are written.
        has_float16_cache: Whether the KV cache is float16 whatever the decoder computes in.
        client_config: What its clients look up in the bundle's config.json.
        app_folder: Folder of the bundle that an app loads by itself, tokenizer and config included; or None.
        check_pictures: Refuses ways to prepare pictures that it cannot take, with a TargetError.
    """

    title: str
    libraries: tuple[str, ...]
    writer: str
    export: str
    check: Callable[[ModelConfig, Recipe, Sequence[LayerPlan]], None]
    predict: Callable[[ModelConfig, MixedSource, Recipe, ModelInputs], Prediction]
    base_bytes: int
    working_bytes: Callable[[ModelConfig, Recipe, Sequence[LayerPlan]], int]
    has_float16_cache: Callable[[Recipe], bool]
    client_config: Callable[[Sequence[Artifact]], dict[str, Any]] = no_client_config
    app_folder: Callable[[Recipe], str | None] = no_app_folder
    check_pictures: Callable[[Recipe, ImageSettings], None] = takes_all_pictures

    def exporter(self) -> Export:
        """The function that exports; loads the libraries, which takes seconds.

        Raises:
            MissingDependencyError: One is not installed.
        """
        try:
            module = import_module(self.writer)
        except ModuleNotFoundError as error:
            raise MissingDependencyError.of(error, f"the {self.title} target") from error
        export: Export = getattr(module, self.export)
        return export


def backend_of(target: Target) -> Backend:
    """The record of a target.

    Raises:
        TargetError: There is no such target.
    """
    record: Backend = import_module(BACKENDS[known_target(target)]).BACKEND
    return record
