"""A model ready to answer, wherever it comes from: a checkpoint or a bundle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.checkpoint.tokenizer import TextTokenizer, read_tokenizer
from fastvlm_convert.decode import Session
from fastvlm_convert.errors import BundleError, MissingDependencyError
from fastvlm_convert.manifest import Manifest, Target
from fastvlm_convert.preprocess import ImageMode, Prompt, build_prompt
from fastvlm_convert.weights.config import ModelConfig

REFERENCE_CONTEXT = 2048

OnProgress = Callable[[float], None]


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


def at_image_size(config: ModelConfig, image_size: int) -> ModelConfig:
    """The same network for another input size: it is convolutional, and its attention has no fixed length."""
    return replace(config, vision=replace(config.vision, image_size=image_size))


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
    try:
        from fastvlm_convert.model.fastvlm import load_model
        from fastvlm_convert.runtime.torch_session import TorchSession
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "checkpoints") from error

    size = image_size or checkpoint.config.vision.image_size
    config = at_image_size(checkpoint.config, size)
    model = load_model(config, checkpoint.weights, on_progress=on_progress)
    return LoadedModel(
        session=TorchSession(model, context_length),
        tokenizer=checkpoint.tokenizer,
        eos_token_ids=checkpoint.eos_token_ids,
        image_size=size,
        image_mode=image_mode or checkpoint.image_mode,
    )


def load_bundle(bundle: Path, manifest: Manifest, target: Target) -> LoadedModel:
    """One target of a bundle.

    Raises:
        BundleError: The target is not in the bundle, or its runtime refuses it.
        MissingDependencyError: The target's runtime is not installed.
    """
    if target not in manifest.targets:
        raise BundleError(f"the bundle has no {target}; it has {', '.join(manifest.targets)}", where=bundle)
    try:
        from fastvlm_convert.runtime.onnx_session import OnnxSession
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "ONNX bundles") from error

    return LoadedModel(
        session=OnnxSession(bundle, manifest),
        tokenizer=read_tokenizer(bundle),
        eos_token_ids=manifest.contract.eos_token_ids,
        image_size=manifest.contract.image_size,
        image_mode=manifest.contract.image_mode,
    )
