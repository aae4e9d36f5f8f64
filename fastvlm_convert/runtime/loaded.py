"""A model ready to answer, wherever it comes from: a checkpoint or a bundle."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastvlm_convert.answer_stream import AnswerStream
from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.checkpoint.tokenizer import TextTokenizer, read_tokenizer
from fastvlm_convert.errors import MissingDependencyError
from fastvlm_convert.generate import answer_tokens, check_fits, greedy, sampler
from fastvlm_convert.io_names import Precision
from fastvlm_convert.manifest import chosen_target, load_manifest, takes_pictures
from fastvlm_convert.pictures import as_seen, load_image
from fastvlm_convert.preprocess import ImageSettings, picture_of, pixel_values
from fastvlm_convert.progress import OnShare, OnStage, ignore_share, ignore_stage
from fastvlm_convert.prompt import Message, Prompt, PromptFormat, build_prompt, user_message
from fastvlm_convert.prompt_cache import MemoryPromptCache, PromptCache
from fastvlm_convert.quantization.prepared_weights import prepare_weights, remembered_calibration
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.weight import MixedSource, dense_view
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.runtime.sessions import open_session
from fastvlm_convert.runtime.threads import Threads
from fastvlm_convert.session import ReusesPrefixes, Session
from fastvlm_convert.targets import Target
from fastvlm_convert.weights.model_config import ModelConfig, at_image_size
from fastvlm_convert.weights.source import WeightSource

if TYPE_CHECKING:  # the reference needs torch, which only those who run it load
    from fastvlm_convert.model.fastvlm import FastVLM

REFERENCE_CONTEXT = 2048
DEFAULT_NEW_TOKENS = 256

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class LoadedModel:
    """A session with everything around it that turns a question into tokens and back.

    Attributes:
        session: Runs the model.
        tokenizer: Text to ids and back.
        eos_token_ids: Ids at which an answer ends.
        images: How pictures are prepared.
        prompt_format: How conversations are written.
        cache: What is known of earlier prompts, so that a picture is encoded once; None keeps nothing.
    """

    session: Session
    tokenizer: TextTokenizer
    eos_token_ids: tuple[int, ...]
    images: ImageSettings
    prompt_format: PromptFormat
    cache: PromptCache | None = None

    def another(self) -> "LoadedModel | None":
        """The same model with a KV cache of its own, for another thread; None if the runtime holds one."""
        session = self.session
        return replace(self, session=session.another()) if isinstance(session, ReusesPrefixes) else None

    def prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        """The prompt for a question about some images, which come first; `<image>` in it is text."""
        return self.conversation([user_message(question, images)])

    def conversation(self, messages: Sequence[Message]) -> Prompt:
        """The prompt for a conversation that ends with a user.

        Raises:
            PromptError: Its roles are out of order.
        """
        return build_prompt(messages, self.prompt_format, self.tokenizer, self.images)

    def unprepared(self, pixels: np.ndarray) -> np.ndarray:
        """What to give `session.encode_image` so that its encoder gets these pixels.

        Args:
            pixels: float32 [1, 3, S, S], prepared.
        """
        if not self.images.in_graph:
            return pixels
        return pixel_values(picture_of(pixels, self.images), self.images)  # a square of this size stays

    def ask(
        self,
        images: Picture | Sequence[Picture] | None,
        question: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> AnswerStream:
        """Answer a question about images; iterate over the result for the pieces of text as they come.

        Asking again ends the answer before: a model holds one conversation.

        Args:
            images: One image, several, or none: files, or images of Pillow.
            question: The question; images come first, and `<image>` in it is text.
            max_new_tokens: Most tokens to answer with; 256 or what fits by default.
            temperature: 0 takes the likeliest token; above 0 samples.
            top_p: Sample from this share of probability.
            seed: Of the sampling.

        Raises:
            ImageError: An image is missing or damaged.
            PromptError: Prompt and answer do not fit into the context.
        """
        return self.reply(
            [user_message(question, _opened(images))],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )

    def reply(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> AnswerStream:
        """Answer the last message of a conversation; see `ask`.

        Raises:
            PromptError: Roles are out of order, or prompt and answer do not fit into the context.
        """
        prompt = self.conversation(messages)
        length, session = prompt.length(self.session.num_image_tokens), self.session
        if max_new_tokens is None:
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, session.context_length - length))
        check_fits(length, max_new_tokens, session.context_length)
        choose = greedy if temperature == 0 else sampler(temperature, top_p, seed)
        tokens = answer_tokens(session, prompt, self.eos_token_ids, max_new_tokens, choose, cache=self.cache)
        return AnswerStream(tokens, self.tokenizer.decode)


def _opened(images: Picture | Sequence[Picture] | None) -> list[Image.Image]:
    """RGB images of what users give."""
    if images is None:
        return []
    given = [images] if isinstance(images, str | Path | Image.Image) else images
    return [as_seen(i) if isinstance(i, Image.Image) else load_image(Path(i)) for i in given]


def load_reference(
    checkpoint: Checkpoint,
    images: ImageSettings | None = None,
    prompt_format: PromptFormat | None = None,
    context_length: int = REFERENCE_CONTEXT,
    on_progress: OnShare = ignore_share,
) -> LoadedModel:
    """The torch reference of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        images: How pictures are prepared where it is not the checkpoint's own way.
        prompt_format: How conversations are written where it is not the checkpoint's own way.
        context_length: Tokens its KV cache holds.
        on_progress: Called with the share of the weights read, 0..1.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    images = images or checkpoint.pictures.image
    config = at_image_size(checkpoint.config, images.size)
    # A float checkpoint is run as the original code runs it, with BatchNorm and LayerScale on their own.
    folded = checkpoint.quantized is not None
    weights = dense_view(checkpoint.folded) if folded else checkpoint.weights
    loaded, _ = _load_model(checkpoint, config, weights, folded, context_length, on_progress)
    prompt_format = prompt_format or checkpoint.prompt.format
    return replace(loaded, images=images, prompt_format=prompt_format, cache=MemoryPromptCache())


def load_folded_reference(
    checkpoint: Checkpoint, on_progress: OnShare = ignore_share
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
    on_progress: OnStage = ignore_stage,
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
    plan = plan_weights(checkpoint, recipe)
    data = None if checkpoint.quantized else remembered_calibration(plan, calibration)
    weights = prepare_weights(plan, data, on_progress).weights
    load = partial(on_progress, "quantized")
    loaded, model = _load_model(checkpoint, plan.config, dense_view(weights), True, context_length, load)
    _round_activations(model, weights)
    return replace(loaded, images=plan.images, prompt_format=plan.prompt)


def _round_activations(model: "FastVLM", weights: MixedSource) -> None:
    """Let the layers of a model multiply integers whose weights say how."""
    from fastvlm_convert.model.static_layer import make_static

    make_static(model, weights)


def _load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: WeightSource,
    folded: bool,
    context_length: int,
    on_progress: OnShare,
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
        images=replace(checkpoint.pictures.image, size=config.vision.image_size),
        prompt_format=checkpoint.prompt.format,
    )
    return loaded, model


def load_bundle(
    bundle: str | Path,
    target: Target | None = None,
    precision: Precision | None = None,
    *,
    threads: int | None = None,
    spinning: bool = True,
    in_turn: bool = False,
) -> LoadedModel:
    """A bundle, ready to answer.

    Args:
        bundle: Its folder.
        target: Which of its formats to run; None takes the first.
        precision: Core ML: how the interpreter runs the packages; None leaves them to Core ML where there is
            one, and else means `exact`. ONNX: `exact` does without int8 activations; None runs it as it is.
        threads: ONNX: how many compute one operation; None takes OMP_NUM_THREADS, or one for each core.
        spinning: ONNX: whether they wait in a busy loop; turn it off where several requests run at a time.
        in_turn: ONNX: load the decoder after the pictures are encoded and the encoder is released. One answer
            then takes a third less memory; a picture that comes later loads the encoder again.

    Raises:
        BundleError: It is no bundle, damaged or of another version; the target is not in it, or its runtime
            refuses it, or the number of threads.
        MissingDependencyError: The target's runtime is not installed.
    """
    bundle = Path(bundle)
    manifest = load_manifest(bundle)
    target = chosen_target(manifest, target, bundle)
    in_graph = any(takes_pictures(artifact) for artifact in manifest.artifacts if artifact.target == target)
    return LoadedModel(
        session=open_session(bundle, manifest, target, precision, Threads(threads, spinning), in_turn),
        tokenizer=read_tokenizer(bundle),
        eos_token_ids=manifest.contract.eos_token_ids,
        images=replace(manifest.contract.images, in_graph=in_graph),
        prompt_format=manifest.contract.conversation,
        cache=MemoryPromptCache(),
    )
