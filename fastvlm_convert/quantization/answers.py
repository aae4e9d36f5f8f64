"""What the reference answers to the questions of a calibration; later runs read it from the user's cache."""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.model.batch import greedy_answers
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.model.fastvlm import load_decoder
from fastvlm_convert.preprocess import ImageSettings, pixel_values
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.prompt import Prompt, Text, prompt_and_pictures
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.quantization.stages import ANSWERS
from fastvlm_convert.quantization.weight_plan import WeightPlan
from fastvlm_convert.recipe_settings import CalibrationSettings
from fastvlm_convert.user_cache import About, about_path, current_tally, save_about, touch
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.model_config import ModelConfig, at_image_size

MAX_ANSWER_TOKENS = 64  # of answers that the reference generates
_TENTH = 10
_ENCODING = 0.6  # share of the time that pictures take: 5.5 of 9 CPU seconds a sample at 0.5B


@dataclass(frozen=True)
class Sample:
    """One question, in tokens.

    Attributes:
        segments: Ids of the prompt's text, int64; the tokens of one image stand between two of them.
        answer: What the reference says, the end token included.
    """

    segments: tuple[np.ndarray, ...]
    answer: np.ndarray

    @property
    def num_pictures(self) -> int:
        """Pictures of the prompt."""
        return len(self.segments) - 1

    def length(self, num_image_tokens: int) -> int:
        """Tokens, with so many for each picture."""
        return sum(map(len, self.segments)) + self.num_pictures * num_image_tokens + len(self.answer)


@dataclass(frozen=True)
class Pictures(Sequence[torch.Tensor]):
    """Pictures as pixel values, float32 [1, 3, S, S] each; made when they are read, to save memory.

    Attributes:
        pictures: Of any size.
        settings: How they are prepared.
    """

    pictures: tuple[Image.Image, ...]
    settings: ImageSettings

    def __len__(self) -> int:
        return len(self.pictures)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "Pictures": ...
    def __getitem__(self, index: int | slice) -> "torch.Tensor | Pictures":
        if isinstance(index, slice):
            return Pictures(self.pictures[index], self.settings)
        return torch.from_numpy(pixel_values(self.pictures[index], self.settings))


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration data as a model sees it.

    Attributes:
        pictures: Of all samples, in order.
        features: The reference's image tokens, float32 [images, num_image_tokens, hidden].
        samples: One for each question with a picture, then texts, several in a sample where they are short;
            those that are held out come last, one for each question.
        num_fitted: Samples that layers are solved with; the others only tell how good the solution is.
    """

    pictures: Pictures
    features: np.ndarray
    samples: tuple[Sample, ...]
    num_fitted: int

    @property
    def num_fitted_pictures(self) -> int:
        """Pictures of the samples that layers are solved with; they come first."""
        return sum(sample.num_pictures for sample in self.samples[: self.num_fitted])


@dataclass(frozen=True)
class _Request:
    """What the reference is asked.

    Attributes:
        prompt: The question, without pixel values.
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
        features: The image tokens of all images in order, float32 [images, num_image_tokens, hidden].
    """

    token_ids: Sequence[np.ndarray]
    features: np.ndarray


def collect_samples(
    plan: WeightPlan, calibration: Calibration, on_progress: OnShare = ignore_share
) -> CalibrationSet:
    """Ask the reference, or read what it said the last time.

    Args:
        plan: A float checkpoint, and the recipe with its image size, prompt and calibration settings.
        calibration: Questions about images.
        on_progress: Called with the share of the questions answered, 0..1.

    Raises:
        RecipeError: A prompt alone is longer than a sample may be, or there is no picture at all.
    """
    checkpoint, images, form = plan.checkpoint, plan.images, plan.prompt
    config = at_image_size(checkpoint.config, images.size)
    asked = [prompt_and_pictures(q.messages, form, checkpoint.tokenizer) for q in calibration.questions]
    prompts = [prompt for prompt, _ in asked]
    pictures = Pictures(tuple(picture for _, shown in asked for picture in shown), images)
    if not pictures:
        raise RecipeError("the calibration data holds no picture", hint="add entries with an 'image'")
    rooms = [_room(n, prompt, config, plan.recipe.calibration) for n, prompt in enumerate(prompts)]
    given = [question.answer is not None for question in calibration.questions]
    # To read a given answer costs next to nothing beside samples as long as it is; to generate one does.
    limits = [
        room if known else min(MAX_ANSWER_TOKENS, room) for room, known in zip(rooms, given, strict=True)
    ]
    key = (checkpoint.sha256, calibration.sha256, images, form, limits)
    path = ANSWERS.path(hashlib.sha256(repr(key).encode()).hexdigest())
    answers = _load_answers(path)
    current_tally().note(ANSWERS, path.name, answers is not None)
    if answers is None:
        requests = [
            _Request(prompt, question.answer, limit)
            for prompt, question, limit in zip(prompts, calibration.questions, limits, strict=True)
        ]
        answers = _ask(checkpoint, config, requests, pictures, on_progress)
        _save_answers(path, answers)
        save_about(path, ANSWERS, About(checkpoint.path.resolve().name, checkpoint.sha256))
    else:
        touch(about_path(path, ANSWERS))
    on_progress(1.0)
    # Gradients begin at the last answer of a sample: of texts in one sample they would weigh that one alone.
    is_packed = plan.recipe.calibration.token_weights != "token"
    return _held_out_last(prompts, pictures, answers, is_packed)


def _held_out_last(
    prompts: Sequence[Prompt], pictures: Pictures, answers: _Answers, is_packed: bool
) -> CalibrationSet:
    """The samples, every tenth of them behind the others; at least one, unless there is no other."""
    held_out = range(_TENTH - 1, len(prompts), _TENTH) or range(1, len(prompts))[-1:]
    fitted = [n for n in range(len(prompts)) if n not in held_out]
    order = [*fitted, *held_out]
    counts = [len(prompt.segments) - 1 for prompt in prompts]
    ends = np.cumsum(counts)
    shown = [i for n in order for i in range(ends[n] - counts[n], ends[n])]
    samples = [Sample(prompts[n].segments, answers.token_ids[n]) for n in order]
    solving = samples[: len(fitted)]
    if is_packed:
        solving = _packed(solving, answers.features.shape[1])
    return CalibrationSet(
        Pictures(tuple(pictures.pictures[i] for i in shown), pictures.settings),
        answers.features[shown],
        (*solving, *samples[len(fitted) :]),
        len(solving),
    )


def _packed(samples: Sequence[Sample], num_image_tokens: int) -> list[Sample]:
    """Samples with a picture, and texts, as many behind each other as are no longer than the longest.

    Samples pass side by side, padded to the longest, so a short one would cost as much. A text reads those
    before it, as in a conversation. Of a wide model only the first samples solve its layers, so the two
    kinds take turns: any number of them is as mixed as all.
    """
    longest = max(sample.length(num_image_tokens) for sample in samples)
    packed: list[Sample] = []
    for text in (sample for sample in samples if not sample.num_pictures):
        last = packed.pop() if packed else None
        if last is not None and last.length(0) + text.length(0) > longest:
            packed.append(last)
            last = None
        before = () if last is None else (*last.segments, last.answer)
        packed.append(Sample((np.concatenate([*before, *text.segments]),), text.answer))
    shown = [sample for sample in samples if sample.num_pictures]
    placed = [((n + 0.5) / len(part), sample) for part in (shown, packed) for n, sample in enumerate(part)]
    return [sample for _, sample in sorted(placed, key=lambda pair: pair[0])]


def _room(number: int, prompt: Prompt, config: ModelConfig, settings: CalibrationSettings) -> int:
    """Tokens left for an answer in a sample."""
    length = prompt.length(config.vision.num_image_tokens)
    if length >= settings.max_tokens:
        raise RecipeError(
            f"calibration.max_tokens is {settings.max_tokens}, but the prompt of sample {number + 1} takes "
            f"{length} tokens",
            hint="raise calibration.max_tokens, shorten the question, or lower common.image_size",
        )
    return settings.max_tokens - length


def _ask(
    checkpoint: Checkpoint,
    config: ModelConfig,
    requests: Sequence[_Request],
    pictures: Pictures,
    on_progress: OnShare,
) -> _Answers:
    """Encode every picture once, then let all prompts that have no answer be answered side by side."""
    encoder = BlockStreamer(config, fold(checkpoint.weights))
    features = encoder.encode(pictures, lambda share: on_progress(share * _ENCODING))
    decoder, seen = load_decoder(config, checkpoint.weights), iter(features)
    eos, embeds = checkpoint.eos_token_ids, []
    for request in requests:
        first, *others = (decoder.embed_tokens(torch.from_numpy(ids)) for ids in request.prompt.segments)
        embeds.append(torch.cat([first, *(part for text in others for part in (next(seen), text))]))
    asked = [n for n, request in enumerate(requests) if request.answer is None]
    said = greedy_answers(
        decoder,
        [embeds[n] for n in asked],
        [requests[n].max_tokens for n in asked],
        eos,
        lambda share: on_progress(_ENCODING + share * (1 - _ENCODING)),
    )
    own = dict(zip(asked, said, strict=True))
    answers = []
    for n, request in enumerate(requests):
        if request.answer is not None:
            ids = checkpoint.tokenizer.encode_texts([Text(request.answer)])[: request.max_tokens - 1]
            ids = [*ids, eos[0]]
        else:
            ids = [eos[0] if token in eos else token for token in own[n]]
        answers.append(np.asarray(ids[: request.max_tokens], np.int64))
    return _Answers(answers, features.numpy())


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

    def first(self, count: int) -> "TokenBatch":
        """The first samples, or all where there are not so many."""
        return self.samples(torch.arange(min(count, len(self.embeds))))

    def samples(self, numbers: torch.Tensor) -> "TokenBatch":
        """Some samples, by number; int64 [n], ascending."""
        row, token = self.answers
        kept = torch.isin(row, numbers)
        answers = torch.searchsorted(numbers, row[kept]), token[kept]
        return TokenBatch(self.embeds[numbers], self.real[numbers], self.image[numbers], answers)


def token_batch(
    samples: Sequence[Sample], features: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]
) -> TokenBatch:
    """Splice image tokens and embeddings together; the answers are fed as they were given.

    Args:
        samples: The samples.
        features: Image tokens of their pictures in order, float32 [pictures, num_image_tokens, hidden].
        embed: int64 [n] -> float32 [n, hidden].
    """
    pictures = iter(features)
    rows, marks, starts = [], [], []
    for sample in samples:
        parts = [embed(torch.from_numpy(sample.segments[0]))]
        is_image = [torch.zeros(len(parts[0]), dtype=torch.bool)]
        for segment in sample.segments[1:]:
            parts += [next(pictures), embed(torch.from_numpy(segment))]
            is_image += [
                torch.ones(len(parts[-2]), dtype=torch.bool),
                torch.zeros(len(segment), dtype=torch.bool),
            ]
        starts.append(sum(len(part) for part in parts) - 1)
        parts.append(embed(torch.from_numpy(sample.answer[:-1])))
        is_image.append(torch.zeros(len(parts[-1]), dtype=torch.bool))
        rows.append(torch.cat(parts))
        marks.append(torch.cat(is_image))
    longest = max(len(row) for row in rows)
    embeds = torch.stack([functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    image = torch.stack([functional.pad(mark, (0, longest - len(mark))) for mark in marks])
    real = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    answers = [
        (n, token)
        for n, (start, sample) in enumerate(zip(starts, samples, strict=True))
        for token in range(start, start + len(sample.answer))
    ]
    row, token = torch.tensor(answers).T
    return TokenBatch(embeds, real, image, (row, token))
