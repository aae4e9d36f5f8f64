"""What the reference answers to the questions of a calibration; later runs read it from the user's cache."""

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
from fastvlm_convert.recipe import CalibrationSettings
from fastvlm_convert.user_cache import cache_folder
from fastvlm_convert.weights.model_config import ModelConfig

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """One question about one image, in tokens.

    Attributes:
        before: Ids before the image tokens, int64.
        after: Ids after them.
        answer: What the reference says, the end token included.
    """

    before: np.ndarray
    after: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration data as a model sees it.

    Attributes:
        pixel_values: float32 [samples, 3, S, S].
        features: The reference's image tokens, float32 [samples, num_image_tokens, hidden].
        samples: One for each image.
    """

    pixel_values: np.ndarray
    features: np.ndarray
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class _Request:
    """What the reference is asked.

    Attributes:
        prompt: Image and question.
        answer: The answer to take in the place of the reference's own, or None.
        max_tokens: Room for the answer.
    """

    prompt: Prompt
    answer: str | None
    max_tokens: int


@dataclass(frozen=True)
class _Answers:
    """What the reference said.

    Attributes:
        token_ids: Of each answer, the end token included; int64.
        features: Its image tokens, float32 [samples, num_image_tokens, hidden].
    """

    token_ids: Sequence[np.ndarray]
    features: np.ndarray


def collect_samples(
    checkpoint: Checkpoint,
    config: ModelConfig,
    mode: ImageMode,
    calibration: Calibration,
    settings: CalibrationSettings,
    on_progress: OnShare,
) -> CalibrationSet:
    """Ask the reference, or read what it said the last time.

    Args:
        checkpoint: The float checkpoint.
        config: Its dimensions, with the image size to calibrate for.
        mode: How images are made square.
        calibration: Images with questions.
        settings: Maximum number of tokens of a sample.
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
    answers = _load_answers(path)
    if answers is None:
        requests = [
            _Request(prompt, question.answer, limit)
            for prompt, question, limit in zip(prompts, calibration.questions, limits, strict=True)
        ]
        answers = _ask(checkpoint, config, requests, on_progress)
        _save_answers(path, answers)
    on_progress(1.0)
    return CalibrationSet(
        np.concatenate([prompt.images[0] for prompt in prompts]),
        answers.features,
        tuple(
            Sample(prompt.segments[0], prompt.segments[1], answer)
            for prompt, answer in zip(prompts, answers.token_ids, strict=True)
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


def _ask(
    checkpoint: Checkpoint, config: ModelConfig, requests: Sequence[_Request], on_progress: OnShare
) -> _Answers:
    longest = max(request.prompt.length(config.vision.num_image_tokens) for request in requests)
    session = TorchSession(load_model(config, checkpoint.weights), longest + MAX_ANSWER_TOKENS)
    eos = checkpoint.eos_token_ids
    answers, features = [], []
    for n, request in enumerate(requests):
        encoded = session.encode_image(request.prompt.images[0])
        features.append(encoded)
        if request.answer is not None:
            said = checkpoint.tokenizer.encode(request.answer)[: request.max_tokens - 1]
        else:
            found = generate(session, request.prompt, eos, request.max_tokens, features=[encoded])
            said = list(found.token_ids)
        answers.append(np.asarray([*said, eos[0]][: request.max_tokens], np.int64))
        on_progress((n + 1) / len(requests))
    return _Answers(answers, np.stack(features))


def _save_answers(path: Path, answers: _Answers) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.asarray([len(ids) for ids in answers.token_ids])
    with whole_file(path) as partial:
        np.savez(partial, ids=np.concatenate(answers.token_ids), lengths=lengths, features=answers.features)


def _load_answers(path: Path) -> _Answers | None:
    """Answers that were saved; None where there are none, or damaged ones."""
    try:
        with np.load(path) as arrays:
            ends = np.cumsum(arrays["lengths"])[:-1]
            return _Answers(np.split(arrays["ids"], ends), arrays["features"])
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
        answers: Sample and token of every position whose logits predict a token of an answer; int64 [n] each.
    """

    embeds: torch.Tensor
    real: torch.Tensor
    image: torch.Tensor
    answers: tuple[torch.Tensor, torch.Tensor]


def token_batch(
    samples: Sequence[Sample], features: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]
) -> TokenBatch:
    """Splice image tokens and embeddings together; the answers are fed as they were given.

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
