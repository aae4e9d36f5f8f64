"""What the parts of the server agree on: a question, what comes of it, and who answers."""

import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from fastvlm_convert.prompt import Prompt

CacheUse = Literal["hit", "feature", "prefix", "miss"]
"""The best cache that an answer came from: whole answers, image features, KV prefixes, or none."""
FinishReason = Literal["stop", "length"]
WorkerState = Literal["starting", "ready", "busy", "restarting", "stopping"]


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen.

    Attributes:
        max_tokens: Most tokens to answer with; at least 1.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample from this share of probability.
        seed: Of the sampling.
        stop: Texts at which the answer ends, without them.
        is_seeded: Whether the client gave the seed, and so expects equal answers to equal questions.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    is_seeded: bool = False

    @property
    def is_repeatable(self) -> bool:
        """Whether equal questions have equal answers, which may be kept."""
        return self.is_greedy or self.is_seeded

    @property
    def is_greedy(self) -> bool:
        """Whether equal questions have equal answers whatever the seed."""
        return self.temperature == 0


@dataclass(frozen=True)
class Question:
    """A validated request, ready for a bundle.

    Attributes:
        request_id: The reply's `x-request-id`.
        prompt: Token ids and prepared pictures.
        image_keys: SHA-256 of what the encoder gets, a picture each, in hexadecimal.
        sampling: How the answer is chosen.
        deadline: `time.monotonic()` after which nobody waits.
        cancelled: Set when the client left; the engine then ends within one token.
        wants_logprob: Whether `Reply.mean_logprob` is needed; it costs time.
        scope: Questions of different scopes share nothing that is kept of prompts.
    """

    request_id: str
    prompt: Prompt
    image_keys: tuple[str, ...]
    sampling: Sampling
    deadline: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    wants_logprob: bool = False
    scope: str = ""


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer.

    Attributes:
        text: The text; never empty.
        answer_tokens: Tokens of the answer so far.
        cache: The best cache that helped; known before the first piece, so that it can stand in a header.
    """

    text: str
    answer_tokens: int
    cache: CacheUse = "miss"


@dataclass(frozen=True)
class StageTimings:
    """Where the time of a reply went; milliseconds."""

    queue_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


@dataclass(frozen=True)
class Reply:
    """A whole answer; the last thing that an engine gives.

    Attributes:
        text: All pieces.
        finish_reason: `stop` where the model or a stop text ended it, `length` at the token limit.
        prompt_tokens: Tokens of the prompt, image tokens included.
        cached_tokens: Those whose keys and values came from a cache.
        answer_tokens: Tokens generated, the final end token included.
        timings: Where the time went.
        cache: The best cache that helped.
        mean_logprob: Mean natural log-probability of the answer's tokens; None where not asked for.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    timings: StageTimings
    cache: CacheUse
    mean_logprob: float | None = None


@dataclass(frozen=True)
class EngineStatus:
    """How an engine is.

    Attributes:
        is_ready: Whether it can answer.
        slots: Questions that it can run at once, now.
        running: Questions that it runs.
        workers: Workers by state.
        restarts: How often a worker was started again since the start.
        executed_by: What executes the bundle, as `run --json` names it; "" until known.
        cache_bytes: Bytes that its caches hold, by cache: `feature`, `prefix`.
        cache_lookups: Hits and misses so far, by (cache, `hit` or `miss`).
        memory_bytes: Resident memory of processes of its own; 0 where there are none.
        waiting: Questions in a queue of its own, where it has one.
        back_in_s: Seconds until it may answer again, where it cannot and the last try to change that failed.
    """

    is_ready: bool
    slots: int
    running: int
    workers: dict[WorkerState, int]
    restarts: int
    executed_by: str
    cache_bytes: dict[str, int]
    cache_lookups: dict[tuple[str, str], int]
    memory_bytes: int = 0
    waiting: int = 0
    back_in_s: float | None = None


class Engine(Protocol):
    """Runs one bundle. Admission, caches of whole answers and the breaker are its caller's.

    All methods are called from the server's event loop, none of them blocks it.
    """

    async def start(self) -> None:
        """Load the bundle; returns when questions can be answered.

        Raises:
            ConversionError: The bundle cannot be loaded, or not as often as asked for.
        """
        ...

    async def stop(self) -> None:
        """End at once; what is still running gets `UnavailableError` (`draining`)."""
        ...

    def answer(self, question: Question) -> AsyncIterator[Piece | Reply]:
        """Run a question, at most `status().slots` at a time: pieces of text as they come, a `Reply` last.

        Raises:
            EngineFailedError: The runtime raised an error.
            UnavailableError: The worker died (`worker_died`) or the engine stops (`draining`).
            DeadlineError: The deadline passed.
            CancelledError: `question.cancelled` was set.
        """
        ...

    def status(self) -> EngineStatus:
        """How it is now."""
        ...


@runtime_checkable
class HasChangingSlots(Protocol):
    """An engine whose slots come and go, as its workers do."""

    def watch_slots(self, on_change: Callable[[], object]) -> None:
        """Call something whenever there may be more slots than before."""
        ...
