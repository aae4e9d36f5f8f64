"""What the reference answers to the questions of a calibration: asked once, kept in the user's cache."""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.generate import generate
from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.model.session import TorchSession
from fastvlm_convert.preprocess import ImageMode, Prompt, build_prompt
from fastvlm_convert.progress import OnShare
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.questions import Question
from fastvlm_convert.recipe import CalibrationSettings
from fastvlm_convert.user_cache import cache_folder
from fastvlm_convert.weights.model_config import ModelConfig

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """One question about one picture, in tokens.

    Attributes:
        before: Ids ahead of the image tokens, int64.
        after: Ids behind them.
        answer: What the reference says, the end token included.
    """

    before: np.ndarray
    after: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class Answered:
    """Calibration data as a model sees it.

    Attributes:
        pixel_values: float32 [samples, 3, S, S].
        features: The reference's image tokens, float32 [samples, num_image_tokens, hidden].
        samples: One a picture.
    """

    pixel_values: np.ndarray
    features: np.ndarray
    samples: tuple[Sample, ...]


def answered(
    checkpoint: Checkpoint,
    config: ModelConfig,
    mode: ImageMode,
    calibration: Calibration,
    settings: CalibrationSettings,
    on_progress: OnShare,
) -> Answered:
    """Ask the reference, or read what it said the last time.

    Args:
        checkpoint: The float checkpoint.
        config: Its dimensions, with the image size to calibrate for.
        mode: How images are made square.
        calibration: Pictures with questions.
        settings: Most tokens of a sample.
        on_progress: Called with the share of the questions answered, 0..1.

    Raises:
        RecipeError: A prompt alone is longer than a sample may be.
    """
    prompts = [
        build_prompt(q.text, [q.image], checkpoint.tokenizer, config.vision.image_size, mode)
        for q in calibration.questions
    ]
    limits = [_room(n, prompt, config, settings) for n, prompt in enumerate(prompts)]
    key = (checkpoint.sha256, calibration.sha256, config.vision.image_size, mode, limits)
    path = cache_folder() / "answers" / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.npz"
    answers, features = _cached(path) or _asked(
        checkpoint, config, prompts, limits, calibration.questions, path, on_progress
    )
    on_progress(1.0)
    return Answered(
        np.concatenate([prompt.images[0] for prompt in prompts]),
        features,
        tuple(
            Sample(prompt.segments[0], prompt.segments[1], answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ),
    )


def _room(number: int, prompt: Prompt, config: ModelConfig, settings: CalibrationSettings) -> int:
    """Tokens left for an answer."""
    length = prompt.length(config.vision.num_image_tokens)
    if length >= settings.max_tokens:
        raise RecipeError(
            f"calibration.max_tokens is {settings.max_tokens}, but the prompt of sample {number + 1} takes "
            f"{length} tokens",
            hint="raise calibration.max_tokens, shorten the question, or lower common.image_size",
        )
    return min(MAX_ANSWER_TOKENS, settings.max_tokens - length)


def _asked(
    checkpoint: Checkpoint,
    config: ModelConfig,
    prompts: Sequence[Prompt],
    limits: Sequence[int],
    questions: Sequence[Question],
    path: Path,
    on_progress: OnShare,
) -> tuple[list[np.ndarray], np.ndarray]:
    longest = max(prompt.length(config.vision.num_image_tokens) for prompt in prompts)
    session = TorchSession(load_model(config, checkpoint.weights), longest + MAX_ANSWER_TOKENS)
    end = checkpoint.eos_token_ids[0]
    answers, features = [], []
    for n, (prompt, limit, question) in enumerate(zip(prompts, limits, questions, strict=True)):
        encoded = session.encode_image(prompt.images[0])
        features.append(encoded)
        if question.answer is not None:
            said = checkpoint.tokenizer.encode(question.answer)[: limit - 1]
        else:
            said = list(
                generate(session, prompt, checkpoint.eos_token_ids, limit, features=[encoded]).token_ids
            )
        answers.append(np.asarray([*said, end][:limit], np.int64))
        on_progress((n + 1) / len(prompts))
    stacked = np.stack(features)
    _keep(path, answers, stacked)
    return answers, stacked


def _keep(path: Path, answers: Sequence[np.ndarray], features: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.asarray([len(a) for a in answers])
    with whole_file(path) as partial:
        np.savez(partial, ids=np.concatenate(answers), lengths=lengths, features=features)


def _cached(path: Path) -> tuple[list[np.ndarray], np.ndarray] | None:
    try:
        with np.load(path) as arrays:
            ends = np.cumsum(arrays["lengths"])[:-1]
            return np.split(arrays["ids"], ends), arrays["features"]
    # A cache that cannot be read is no cache.
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


@dataclass(frozen=True)
class TokenBatch:
    """All samples side by side, each padded at its end.

    Attributes:
        embeds: float32 [samples, tokens, hidden].
        real: bool [samples, tokens]; false where padded.
        image: bool [samples, tokens]; true at image tokens.
        answers: Row and token of every position whose logits predict a token of an answer; int64 [n] each.
    """

    embeds: torch.Tensor
    real: torch.Tensor
    image: torch.Tensor
    answers: tuple[torch.Tensor, torch.Tensor]


def token_batch(
    samples: Sequence[Sample], features: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]
) -> TokenBatch:
    """Splice image tokens and embeddings together, answers fed as they were given.

    Args:
        samples: The samples.
        features: float32 [samples, num_image_tokens, hidden].
        embed: int64 [n] -> float32 [n, hidden].
    """
    count = features.shape[1]
    rows, places = [], []
    for sample, tokens in zip(samples, features, strict=True):
        fed = np.concatenate([sample.before, sample.after, sample.answer[:-1]])
        text = embed(torch.from_numpy(fed))
        first = len(sample.before)
        rows.append(torch.cat([text[:first], tokens, text[first:]]))
        places.append((first, first + count + len(sample.after) - 1, len(sample.answer)))
    longest = max(len(row) for row in rows)
    embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    real, image = torch.zeros(2, len(rows), longest, dtype=torch.bool)
    for n, (row, (first, _, _)) in enumerate(zip(rows, places, strict=True)):
        real[n, : len(row)] = True
        image[n, first : first + count] = True
    answers = [(n, t) for n, (_, start, length) in enumerate(places) for t in range(start, start + length)]
    row, token = torch.tensor(answers).T
    return TokenBatch(embeds, real, image, (row, token))
