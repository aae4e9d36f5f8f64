"""One question on one loaded bundle, in the thread that calls; every engine runs this, wherever it is."""

import time
from collections.abc import Callable, Generator, Iterator
from typing import Final

import numpy as np

from fastvlm_convert.generate import Answer, Sampler, answer_tokens, greedy, log_probability, sampler
from fastvlm_convert.prompt_cache import PromptCache
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.serve.engine import CacheUse, FinishReason, Piece, Question, Reply, StageTimings
from fastvlm_convert.serve.errors import CancelledError, DeadlineError
from fastvlm_convert.session import KvPrefix

_HALF_A_CHARACTER: Final = "\ufffd"


def answer_question(
    model: LoadedModel, question: Question, clock: Callable[[], float] = time.monotonic
) -> Iterator[Piece | Reply]:
    """Pieces of text as they come, a `Reply` last; the tokens are those of `run`.

    A stop text ends the answer as the end token does. Whether somebody still waits is seen at the beginning,
    after each picture that was encoded (where a cache keeps it), and before each token.

    Args:
        model: The bundle, with a sequence that nobody else uses.
        question: The question.
        clock: What `question.deadline` is on.

    Raises:
        ConversionError: The runtime raised an error.
        DeadlineError: The deadline passed.
        CancelledError: `question.cancelled` was set.
    """
    writing = _Writing(model, question, clock)
    writing.see_that_somebody_waits()
    known = None if model.cache is None else _WatchedCache(model.cache, writing, question.scope)
    tokens: Generator[int, None, Answer] = answer_tokens(
        model.session,
        question.prompt,
        model.eos_token_ids,
        question.sampling.max_tokens,
        writing.choose,
        cache=known,
        image_keys=question.image_keys,
    )
    written = 0
    answer: Answer | None = None
    while answer is None:
        try:
            next(tokens)
        except StopIteration as end:
            answer = end.value
        text = writing.text if answer is not None else writing.settled_text()
        if len(text) > written:
            yield Piece(text[written:], writing.num_tokens, "miss" if known is None else known.use)
            written = len(text)
    yield writing.reply(answer, "miss" if known is None else known.use)


class _WatchedCache:
    """The part of a cache that a question may see, which says what it was good for; a `PromptCache`."""

    def __init__(self, cache: PromptCache, writing: "_Writing", scope: str) -> None:
        self.use: CacheUse = "miss"
        self._writing = writing
        self._cache = cache
        self._scope = scope

    def get_features(self, key: str) -> np.ndarray | None:
        """Image tokens of a picture."""
        found = self._cache.get_features(f"{self._scope}{key}")
        if found is not None and self.use == "miss":
            self.use = "feature"
        return found

    def put_features(self, key: str, features: np.ndarray) -> None:
        """Keep image tokens; the end of a question that nobody waits for, as encoding takes longest."""
        self._cache.put_features(f"{self._scope}{key}", features)
        self._writing.see_that_somebody_waits()

    def put_prefix(self, key: str, prefix: KvPrefix) -> None:
        """Keep keys and values."""
        self._cache.put_prefix(f"{self._scope}{key}", prefix)

    def get_prefix(self, key: str) -> KvPrefix | None:
        """Keys and values of a chunk."""
        found = self._cache.get_prefix(f"{self._scope}{key}")
        if found is not None:
            self.use = "prefix"
        return found


class _Writing:
    """An answer while it is written: chooses tokens, and ends at a stop text by choosing the end token."""

    def __init__(self, model: LoadedModel, question: Question, clock: Callable[[], float]) -> None:
        sampling = question.sampling
        self.text = ""
        self.num_tokens = 0
        self._model = model
        self._question = question
        self._clock = clock
        self._pick: Sampler = (
            greedy if sampling.is_greedy else sampler(sampling.temperature, sampling.top_p, sampling.seed)
        )
        self._ids: list[int] = []
        self._logprob = 0.0
        self._found_stop = False

    def choose(self, logits: np.ndarray) -> int:
        """The next token; the end token where the one picked completes a stop text."""
        self.see_that_somebody_waits()
        token = self._pick(logits)
        self.num_tokens += 1
        if self._question.wants_logprob:
            self._logprob += log_probability(logits, token)
        if token in self._model.eos_token_ids:
            return token
        self._ids.append(token)
        self.text = self._model.tokenizer.decode(self._ids)
        ends = [at for stop in self._question.sampling.stop if (at := self.text.find(stop)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            self._found_stop = True
            return self._model.eos_token_ids[0]
        return token

    def settled_text(self) -> str:
        """The text that no further token changes: no half character, no beginning of a stop text."""
        if self.text.endswith(_HALF_A_CHARACTER):
            return ""
        held = max((_overlap(self.text, stop) for stop in self._question.sampling.stop), default=0)
        return self.text[: len(self.text) - held]

    def reply(self, answer: Answer, cache: CacheUse) -> Reply:
        """The whole answer."""
        timings = answer.timings
        reason: FinishReason = "stop" if answer.finished else "length"
        return Reply(
            text=self.text,
            finish_reason=reason,
            prompt_tokens=timings.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            answer_tokens=timings.answer_tokens,
            timings=StageTimings(
                vision_ms=timings.vision_s * 1000 if answer.encoded_images else 0.0,
                prefill_ms=timings.prefill_s * 1000,
                decode_ms=timings.decode_s * 1000,
            ),
            cache=cache,
            mean_logprob=self._logprob / self.num_tokens if self._question.wants_logprob else None,
        )

    def see_that_somebody_waits(self) -> None:
        """See that.

        Raises:
            DeadlineError: The deadline passed.
            CancelledError: The client left.
        """
        if self._question.cancelled.is_set():
            raise CancelledError("the client left", code="cancelled")
        if self._clock() > self._question.deadline:
            raise DeadlineError("the answer was not there in time", code="deadline")


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
