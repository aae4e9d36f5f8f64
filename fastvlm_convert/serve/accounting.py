"""What became of each request: for the metrics, the window behind `/health`, the log and traces."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

from fastvlm_convert.serve.engine import CacheUse, Piece, Reply, Sampling
from fastvlm_convert.serve.errors import (
    CancelledError,
    DeadlineError,
    RateLimitedError,
    RequestError,
    UnavailableError,
)
from fastvlm_convert.serve.escalation import Decided
from fastvlm_convert.serve.health import Window, succeeded
from fastvlm_convert.serve.logs import Access, ClientHasher, log_access
from fastvlm_convert.serve.metrics import Metrics
from fastvlm_convert.serve.traces import TracedAnswer, Traces

CLIENT_LEFT: Final = 499
INTERNAL: Final = 500


@dataclass
class Account:
    """What is known of a request so far.

    Attributes:
        request_id: Its id.
        client: Id of its API key, or its address; never shown as it is.
        route: The path as it is declared.
        began: When it came, on the server's clock.
        code: The HTTP status that was sent.
        model: The bundle that was asked.
        sampling: How the answer is chosen; None for what is no question.
        reply: The answer.
        first_token_at: When its first token was there.
        error: Why there is no answer, or no whole one.
    """

    request_id: str
    client: str
    route: str
    began: float
    code: int = 0
    model: str | None = None
    sampling: Sampling | None = None
    reply: Reply | None = None
    first_token_at: float | None = None
    error: RequestError | None = None

    @property
    def final_code(self) -> int:
        """The status, or what it would be where a stream had begun before something went wrong."""
        if isinstance(self.error, CancelledError):
            return CLIENT_LEFT
        if self.error is not None:
            return int(self.error.status)
        return self.code or INTERNAL  # a bug's response is sent once it has passed all of our own code


@dataclass(frozen=True)
class Accounts:
    """Where accounts go when requests end.

    Attributes:
        metrics: The server's.
        window: The last minutes.
        traces: Records them where that is asked for.
        hash_client: Names clients in the log.
        clock: Seconds that only go forward.
    """

    metrics: Metrics
    window: Window
    traces: Traces
    hash_client: ClientHasher = field(default_factory=ClientHasher)
    clock: Callable[[], float] = time.monotonic

    async def watched(
        self, account: Account, items: AsyncIterator[Piece | Reply]
    ) -> AsyncGenerator[Piece | Reply, None]:
        """The same items, noted as they pass."""
        last_at, last_tokens = account.began, 0
        async for item in items:
            now = self.clock()
            model = account.model or ""
            if isinstance(item, Reply):
                account.reply = item
            elif account.first_token_at is None:
                account.first_token_at = now
                self.metrics.first_token(model, now - account.began)
                last_at, last_tokens = now, item.answer_tokens
            else:
                tokens = max(1, item.answer_tokens - last_tokens)
                self.metrics.inter_token(model, (now - last_at) / tokens)
                last_at, last_tokens = now, item.answer_tokens
            yield item

    def escalated(self, decided: Decided) -> None:
        """Note what became of an answer that was judged, and what it cost where it is not the one sent."""
        first = decided.first
        if first is None:
            return
        self.metrics.escalated(first.bundle, first.outcome)
        if first.outcome == "escalated" and first.reply.cache != "hit":
            self.metrics.stages(first.bundle, first.reply.timings)
            self.metrics.tokens(first.bundle, first.reply.prompt_tokens, first.reply.answer_tokens)

    def ended(self, account: Account) -> None:
        """Note that a question has its last byte, or that its client left."""
        seconds = self.clock() - account.began
        code, error, reply = account.final_code, account.error, account.reply
        cache: CacheUse | None = None if reply is None or error is not None else reply.cache
        self.metrics.request_finished(account.model, code, cache, seconds)
        self.window.add(seconds, succeeded(code))
        if isinstance(error, UnavailableError | RateLimitedError | DeadlineError):
            self.metrics.rejected(error.code)
        if isinstance(error, CancelledError):
            self.metrics.cancelled()
        if reply is not None and reply.cache != "hit" and account.model is not None:
            self.metrics.stages(account.model, reply.timings)
            self.metrics.tokens(account.model, reply.prompt_tokens, reply.answer_tokens)
        if account.sampling is not None and account.model is not None:
            self.traces.answered(self._traced(account, account.model, account.sampling, seconds))

    def logged(self, account: Account) -> None:
        """Log a request that ended, whatever it was."""
        reply = account.reply
        log_access(
            Access(
                request_id=account.request_id,
                client=self.hash_client(account.client),
                route=account.route,
                code=account.final_code,
                seconds=self.clock() - account.began,
                model=account.model,
                cache=None if reply is None else reply.cache,
                timings=None if reply is None else reply.timings,
                prompt_tokens=None if reply is None else reply.prompt_tokens,
                answer_tokens=None if reply is None else reply.answer_tokens,
                error=None if account.error is None else account.error.code,
            )
        )

    def _traced(self, account: Account, model: str, sampling: Sampling, seconds: float) -> TracedAnswer:
        first = account.first_token_at
        return TracedAnswer(
            model=model,
            request_id=account.request_id,
            sampling=sampling,
            seconds=seconds,
            first_token_s=None if first is None else first - account.began,
            reply=account.reply,
            error=None if account.error is None else account.error.code,
        )
