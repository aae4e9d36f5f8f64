"""Task accuracy: how many generated questions a model answers exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from fastvlm_convert.demo.samples import Sample
from fastvlm_convert.generate import stream_tokens
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.runtime.loaded import LoadedModel

MAX_ANSWER_TOKENS = 96  # longer than any answer of the generator


@dataclass(frozen=True)
class Score:
    """Answers of one kind of question.

    Attributes:
        correct: Answers equal to the expected text.
        total: Questions asked.
    """

    correct: int
    total: int

    @property
    def share(self) -> float:
        """Share of correct answers, 0..1."""
        return self.correct / self.total


def accuracy(
    model: LoadedModel, samples: Sequence[Sample], on_progress: OnShare = ignore_share
) -> dict[str, Score]:
    """Ask every question of every sample, greedily.

    Returns:
        One score a kind of question, and `all`.
    """
    correct: dict[str, int] = {}
    total: dict[str, int] = {}
    for number, sample in enumerate(samples):
        features: list[np.ndarray] = []
        for question in sample.questions:
            prompt = model.prompt(question.question, [sample.image])
            if not features:  # the picture is the same for all its questions
                features = [model.session.encode_image(image) for image in prompt.images]
            answer = _answer(model, embed_prompt(model.session, prompt, features))
            for kind in (question.kind, "all"):
                correct[kind] = correct.get(kind, 0) + (answer == question.answer)
                total[kind] = total.get(kind, 0) + 1
        on_progress((number + 1) / len(samples))
    return {kind: Score(correct[kind], total[kind]) for kind in total}


def _answer(model: LoadedModel, embeds: np.ndarray) -> str:
    tokens = stream_tokens(model.session, model.session.prefill(embeds), MAX_ANSWER_TOKENS)
    return model.tokenizer.decode(list(takewhile(lambda t: t not in model.eos_token_ids, tokens)))
