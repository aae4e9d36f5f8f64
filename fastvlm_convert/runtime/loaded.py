"""A model ready to answer, wherever it comes from: a checkpoint or a bundle."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.checkpoint.tokenizer import TextTokenizer, read_tokenizer
from fastvlm_convert.errors import BundleError, MissingDependencyError
from fastvlm_convert.generate import Session
from fastvlm_convert.io_names import Precision
from fastvlm_convert.manifest import Manifest, Target
from fastvlm_convert.preprocess import ImageMode, Prompt, build_prompt
from fastvlm_convert.quantization.prepared_weights import prepare_weights, remembered_calibration, resolve
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.runtime.contract import check_artifacts
from fastvlm_convert.weights.model_config import ModelConfig, at_image_size
from fastvlm_convert.weights.rescale import repaired_config
from fastvlm_convert.weights.source import WeightSource

if TYPE_CHECKING:  # the reference needs torch, which only those who run it load
    from fastvlm_convert.model.fastvlm import FastVLM

REFERENCE_CONTEXT = 2048

OnProgress = Callable[[float], None]
OnStage = Callable[[str, float], None]


@dataclass(frozen=True)
class LoadedModel:
    """A session with everything around it that turns a question into tokens and back.

    Attributes:
        session: Runs the model.
        tokenizer: Text to ids and back.
        eos_token_ids: Ids at which an answer ends.
        image_size: Edge of the square input in pixels.
        image_mode: How images are made square.
    """

    session: Session
    tokenizer: TextTokenizer
    eos_token_ids: tuple[int, ...]
    image_size: int
    image_mode: ImageMode

    def prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        """The prompt for a question about some images."""
        return build_prompt(question, images, self.tokenizer, self.image_size, self.image_mode)


def load_reference(
    checkpoint: Checkpoint,
    image_size: int | None = None,
    image_mode: ImageMode | None = None,
    context_length: int = REFERENCE_CONTEXT,
    on_progress: OnProgress | None = None,
) -> LoadedModel:
    """The torch reference of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        image_size: Edge of the input in pixels where it is not the checkpoint's own.
        image_mode: How images are made square where it is not the checkpoint's own.
        context_length: Tokens its KV cache holds.
        on_progress: Called with the share of the weights read, 0..1.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    config = checkpoint.config if image_size is None else at_image_size(checkpoint.config, image_size)
    # A float checkpoint is run as the original code runs it, with BatchNorm and LayerScale on their own.
    folded = checkpoint.quantized is not None
    weights = dense_view(checkpoint.folded) if folded else checkpoint.weights
    loaded, _ = _load_model(checkpoint, config, weights, folded, context_length, on_progress)
    return loaded if image_mode is None else replace(loaded, image_mode=image_mode)


def load_folded_reference(
    checkpoint: Checkpoint, on_progress: OnProgress | None = None
) -> tuple[LoadedModel, "FastVLM"]:
    """The reference with the weights that programs compute with, and the module itself for hooks.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    weights = dense_view(checkpoint.folded)
    return _load_model(checkpoint, checkpoint.config, weights, True, REFERENCE_CONTEXT, on_progress)


def load_engine(
    checkpoint: Checkpoint,
    recipe: Recipe,
    context_length: int,
    calibration: str | None = None,
    on_progress: OnStage = lambda stage, share: None,
) -> LoadedModel:
    """The reference holding the weights that a recipe's integers stand for.

    It judges the integers alone, and gives the exporters' graphs something to be exact to.

    Args:
        checkpoint: The checkpoint.
        recipe: The recipe.
        context_length: Tokens its KV cache holds.
        calibration: Hash of the data that its layers were solved with, if any.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        RecipeError: Layers must be solved with data that is not at hand.
        MissingDependencyError: torch is not installed.
    """
    recipe, size, mode = resolve(checkpoint, recipe)
    config = repaired_config(at_image_size(checkpoint.config, size), recipe.repairs)
    data = None if checkpoint.quantized else remembered_calibration(recipe, calibration)
    weights = dense_view(prepare_weights(checkpoint, recipe, data, on_progress).weights)
    load = partial(on_progress, "quantized")
    loaded, _ = _load_model(checkpoint, config, weights, True, context_length, load)
    return replace(loaded, image_mode=mode)


def _load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: WeightSource,
    folded: bool,
    context_length: int,
    on_progress: OnProgress | None,
) -> tuple[LoadedModel, "FastVLM"]:
    """The torch model with some weights, ready to answer; and the module itself."""
    try:
        from fastvlm_convert.model.fastvlm import load_model
        from fastvlm_convert.model.session import TorchSession
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "running a checkpoint") from error

    model = load_model(config, weights, folded, on_progress)
    loaded = LoadedModel(
        session=TorchSession(model, context_length),
        tokenizer=checkpoint.tokenizer,
        eos_token_ids=checkpoint.eos_token_ids,
        image_size=config.vision.image_size,
        image_mode=checkpoint.image_mode,
    )
    return loaded, model


def has_core_ml() -> bool:
    """Whether this machine can run Core ML packages."""
    return platform.system() == "Darwin"


def load_bundle(
    bundle: Path, manifest: Manifest, target: Target, precision: Precision | None = None
) -> LoadedModel:
    """One target of a bundle.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        target: The target.
        precision: Core ML: how the interpreter runs the packages; None leaves them to Core ML where there is
            one, and else means `exact`. ONNX: `exact` does without int8 activations; None runs it as it is.

    Raises:
        BundleError: The target is not in the bundle, or its runtime refuses it.
        MissingDependencyError: The target's runtime is not installed.
    """
    if target not in manifest.targets:
        raise BundleError(f"the bundle has no {target}; it has {', '.join(manifest.targets)}", where=bundle)
    check_artifacts(manifest, target)
    return LoadedModel(
        session=_SESSIONS[target](bundle, manifest, precision),
        tokenizer=read_tokenizer(bundle),
        eos_token_ids=manifest.contract.eos_token_ids,
        image_size=manifest.contract.image_size,
        image_mode=manifest.contract.image_mode,
    )


def _onnx_session(bundle: Path, manifest: Manifest, precision: Precision | None) -> Session:
    try:
        from fastvlm_convert.runtime.onnx_session import OnnxSession
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "running an ONNX bundle") from error

    return OnnxSession(bundle, manifest, exact=precision == "exact")


def _coreml_session(bundle: Path, manifest: Manifest, precision: Precision | None) -> Session:
    try:
        from fastvlm_convert.runtime.coreml_session import CoreMLSession, InterpretedPackage
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "running a Core ML bundle") from error

    vision, decoder = (
        (bundle / manifest.artifact("coreml", part).files[0]).parent for part in ("vision", "decoder")
    )
    if precision is None and has_core_ml():
        from fastvlm_convert.runtime.coreml_package import CoreMLPackage

        return CoreMLSession(manifest, CoreMLPackage(vision), CoreMLPackage(decoder))
    precision = precision or "exact"
    return CoreMLSession(
        manifest, InterpretedPackage(vision, precision), InterpretedPackage(decoder, precision)
    )


_SESSIONS: dict[Target, Callable[[Path, Manifest, Precision | None], Session]] = {
    "onnx": _onnx_session,
    "coreml": _coreml_session,
}
