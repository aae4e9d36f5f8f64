"""What the reference makes of a question: everything that a candidate is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from fastvlm_convert.generate import check_fits, greedy
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.session import ReadsAtOnce

_ASKING: Final = 0.5  # share of the work that pictures are


@dataclass(frozen=True)
class ReferenceRun:
    """One answered question.

    Attributes:
        prompt: The prompt, with its pictures.
        features: Image tokens of each picture, float32 [tokens, hidden].
        embeds: Embeddings of the whole prompt, float32 [tokens, hidden].
        token_ids: The greedy answer without its end token.
        finished: Whether the model ended the answer itself.
        fed: What was fed after the prompt: the answer, or the end token where the answer is empty, so that
            at least one decode step is compared.
        logits: Before each of the fed tokens and after the last, float32 [fed + 1, vocab].
    """

    prompt: Prompt
    features: tuple[np.ndarray, ...]
    embeds: np.ndarray
    token_ids: tuple[int, ...]
    finished: bool
    fed: tuple[int, ...]
    logits: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, its end included if it ended."""
        return len(self.token_ids) + self.finished

    def shortened(self, max_new_tokens: int) -> "ReferenceRun":
        """What asking for a shorter answer would have given."""
        if len(self.token_ids) < max_new_tokens:
            return self
        said = self.token_ids[:max_new_tokens]
        return replace(self, token_ids=said, finished=False, fed=said, logits=self.logits[: len(said) + 1])

    def differences(self, logits: np.ndarray, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of the answer, its end included if it ended, that another model would not have said.

        None, exactly where greedy decoding gives the same answer: as long as every token is the same, feeding
        the reference's answer and feeding one's own is the same.

        Args:
            logits: The other model's, given the fed tokens, float32 [fed + 1, vocab].
            eos_token_ids: Ids at which it ends an answer.
        """
        said = [greedy(row) for row in logits]
        ends = [token in eos_token_ids for token in said]
        pairs = enumerate(zip(said, self.token_ids, strict=False))
        differing = [n for n, (ours, theirs) in pairs if ours != theirs or ends[n]]
        if self.finished and not ends[len(self.token_ids)]:
            differing.append(len(self.token_ids))
        return tuple(differing)


def remembering(model: LoadedModel) -> LoadedModel:
    """A torch model that encodes every picture and reads every prompt once; it remembers no others."""
    from fastvlm_convert.model.session import RememberingSession, TorchSession

    session = model.session
    assert isinstance(session, TorchSession)
    return replace(model, session=RememberingSession(session.model, session.context_length))


@dataclass(frozen=True)
class _Asked:
    """A question that the reference has not answered yet; see `ReferenceRun`."""

    prompt: Prompt
    features: tuple[np.ndarray, ...]
    embeds: np.ndarray
    limit: int


def run_questions(
    reference: LoadedModel,
    questions: Sequence[Question],
    max_new_tokens: int,
    on_progress: OnShare = ignore_share,
    hints: Sequence[ReferenceRun] | None = None,
) -> tuple[ReferenceRun, ...]:
    """Answer all questions greedily, once for everything that is compared with the answers.

    They are answered side by side, and each answer is read once more in one pass, whose logits are kept.
    Where these do not confirm every token, because two were closer than float32 rounds, the question is
    answered once more, alone.

    Args:
        reference: The reference; its session reads at once.
        questions: What is asked.
        max_new_tokens: Longest answer; fewer where the context ends before.
        on_progress: Called with the share of the work that is done, 0..1.
        hints: What another model made of the questions: the more alike, the sooner the answers are there.

    Raises:
        PromptError: A prompt leaves no room for an answer.
    """
    session, ends = reference.session, reference.eos_token_ids
    assert isinstance(session, ReadsAtOnce)
    asked = []
    for number, question in enumerate(questions):
        asked.append(_ask(reference, question, max_new_tokens))
        on_progress(_ASKING * (number + 1) / len(questions))
    answers = session.greedy_answers(
        [a.embeds for a in asked],
        [a.limit for a in asked],
        ends,
        lambda share: on_progress(_ASKING + (1 - _ASKING) * share),
        [run.token_ids for run in hints or ()] or None,
    )
    return tuple(_confirmed(reference, a, *answer) for a, answer in zip(asked, answers, strict=True))


def _ask(reference: LoadedModel, question: Question, max_new_tokens: int) -> _Asked:
    session = reference.session
    prompt = reference.conversation(question.messages)
    features = tuple(session.encode_image(image) for image in prompt.images)
    embeds = embed_prompt(session, prompt, features)
    limit = max(1, min(max_new_tokens, session.context_length - len(embeds)))
    check_fits(len(embeds), limit, session.context_length)
    return _Asked(prompt, features, embeds, limit)


def _confirmed(
    reference: LoadedModel, asked: _Asked, said: Sequence[int], logits: np.ndarray
) -> ReferenceRun:
    """An answer with the logits that lead to it."""
    finished = said[-1] in reference.eos_token_ids
    answer = said[:-1] if finished else said
    fed = tuple(answer) or tuple(said)
    if any(greedy(row) != token for row, token in zip(logits, said, strict=False)):
        return _answered_alone(reference, asked)
    return ReferenceRun(asked.prompt, asked.features, asked.embeds, tuple(answer), finished, fed, logits)


def _answered_alone(reference: LoadedModel, asked: _Asked) -> ReferenceRun:
    """An answer decoded token by token."""
    ends = reference.eos_token_ids
    rows = [reference.session.prefill(asked.embeds)]
    answer: list[int] = []
    finished = False
    while len(answer) < asked.limit and not finished:
        token = greedy(rows[-1])
        finished = token in ends
        if not finished:
            answer.append(token)
            rows.append(_decode(reference, token))
    fed = tuple(answer) or ends[:1]
    if not answer:
        rows += [_decode(reference, token) for token in fed]
    logits = np.stack(rows)
    return ReferenceRun(asked.prompt, asked.features, asked.embeds, tuple(answer), finished, fed, logits)


def _decode(model: LoadedModel, token: int) -> np.ndarray:
    return model.session.decode(model.session.embed(np.asarray([token], np.int64)))
