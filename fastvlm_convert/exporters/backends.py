"""What everything outside a backend's own folders knows about it: one record each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fastvlm_convert.errors import MissingDependencyError
from fastvlm_convert.exporters.job import ExportJob, Statement
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.manifest import Artifact, Contract, Manifest
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import FloatSettings
from fastvlm_convert.targets import BACKENDS, Target, known_target
from fastvlm_convert.weights.model_config import ModelConfig

Export = Callable[[ExportJob], list[Artifact]]


@dataclass(frozen=True)
class Prediction:
    """What an export will write.

    Attributes:
        sizes: Bytes of every graph, program and weight file, by its path relative to the bundle.
        artifacts: What the files hold, as the export itself will say.
        notes: What the target does otherwise than the plan of layers says, and what users should know of it.
    """

    sizes: Mapping[str, int]
    artifacts: Sequence[Artifact]
    notes: Sequence[str] = ()


def no_client_config(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """Of a backend whose clients look nothing up in config.json."""
    del artifacts
    return {}


def takes_all_pictures(recipe: Recipe, images: ImageSettings) -> None:
    """Of a backend that leaves pictures to its clients, or can prepare them in every way."""
    del recipe, images


def no_client_documents(
    config: ModelConfig, contract: Contract, pad_token_id: int, artifacts: Sequence[Artifact]
) -> dict[str, dict[str, Any]]:
    """Of a backend whose clients read no file that the others do not."""
    del config, contract, pad_token_id, artifacts
    return {}


def no_app_folders(
    config: ModelConfig, recipe: Recipe, layers: Sequence[LayerPlan]
) -> dict[str, dict[str, Any]]:
    """Of a backend without an app that reads a folder of its own."""
    del config, recipe, layers
    return {}


def no_card_section(manifest: Manifest, target: Target) -> str:
    """Of a backend whose bundles nobody opens by a few lines of code."""
    del manifest, target
    return ""


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
        predict: What an export of weights without content will write; without a statement, where no
            checkpoint is at hand, about what.
        base_bytes: Memory of an export before a weight is read.
        working_bytes: Memory beside that while weights are written.
        auto_compute: What the decoder computes in where a recipe says `auto`: what is fast there.
        has_float16_cache: Whether the KV cache is float16 whatever the decoder computes in.
        client_config: What its clients look up in the bundle's config.json.
        check_pictures: Refuses ways to prepare pictures that it cannot take, with a TargetError.
        client_documents: JSON files at the bundle's root that its clients alone read, by name; made of
            dimensions, contract, the id that pads and its artifacts.
        app_folders: Folders of the bundle that an app or a library loads by itself, tokenizer and config
            included, and what the config.json of each says beside or instead of the model's dimensions.
            Backends may share one.
        folders: Folders of a bundle that hold files of this format alone.
        store: What delivers such files to its devices, by its name in `delivery.stores`; or None.
        card_library: What Hugging Face calls the library that opens such bundles; or None.
        card_section: Code that opens one, in Markdown; made of its manifest and the target's name.
    """

    title: str
    libraries: tuple[str, ...]
    writer: str
    export: str
    check: Callable[[ModelConfig, Recipe, Sequence[LayerPlan]], None]
    predict: Callable[[ModelConfig, MixedSource, Recipe, Statement | None], Prediction]
    base_bytes: int
    working_bytes: Callable[[ModelConfig, Recipe, Sequence[LayerPlan]], int]
    auto_compute: FloatName
    has_float16_cache: Callable[[Recipe], bool]
    client_config: Callable[[Sequence[Artifact]], dict[str, Any]] = no_client_config
    check_pictures: Callable[[Recipe, ImageSettings], None] = takes_all_pictures
    client_documents: Callable[
        [ModelConfig, Contract, int, Sequence[Artifact]], dict[str, dict[str, Any]]
    ] = no_client_documents
    app_folders: Callable[[ModelConfig, Recipe, Sequence[LayerPlan]], dict[str, dict[str, Any]]] = (
        no_app_folders
    )
    folders: tuple[str, ...] = ()
    store: str | None = None
    card_library: str | None = None
    card_section: Callable[[Manifest, Target], str] = no_card_section

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


def decoder_settings(recipe: Recipe, target: Target) -> FloatSettings:
    """The decoder's precision on a target.

    Raises:
        TargetError: There is no such target.
    """
    return recipe.decoder.on(backend_of(target).auto_compute)
