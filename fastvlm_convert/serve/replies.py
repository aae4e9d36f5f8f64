"""An answer as OpenAI's API gives it: whole, or in server-sent events."""

import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import Request
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from fastvlm_convert.serve.engine import Piece, Reply
from fastvlm_convert.serve.errors import RequestError
from fastvlm_convert.serve.escalation import FirstAnswer
from fastvlm_convert.serve.schema import (
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    EscalatedUsage,
    PromptTokensDetails,
    ReplyMessage,
    ReplyTimings,
    Usage,
)

CACHE_HEADER: Final = "x-fastvlm-cache"
_DONE: Final = "[DONE]"
_PING_S: Final = 10


@dataclass(frozen=True)
class ReplyHead:
    """What all parts of a reply have in common.

    Attributes:
        request_id: The request's.
        model: The bundle's name.
        first: The answer of a bundle that was asked before, where there was one.
        headers: Those that say who answered.
        created: When, in seconds since 1970.
    """

    request_id: str
    model: str
    first: FirstAnswer | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        """The reply's name."""
        return f"chatcmpl-{self.request_id}"


def whole_reply(head: ReplyHead, reply: Reply) -> ChatCompletion:
    """An answer that is sent at once."""
    choice = Choice(message=ReplyMessage(content=reply.text), finish_reason=reply.finish_reason)
    return ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[choice],
        usage=_usage(head, reply),
        timings=_timings(reply),
    )


def error_response(error: RequestError) -> JSONResponse:
    """An error as the whole response."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def events(
    head: ReplyHead,
    items: AsyncIterator[Piece | Reply],
    includes_usage: bool,
    on_error: Callable[[RequestError], None],
) -> AsyncIterator[dict[str, str]]:
    """The data of server-sent events; no `[DONE]` after an error, so that no part is taken for the whole."""
    yield _event(_chunk(head, Delta(role="assistant", content="")))
    try:
        async for item in items:
            if isinstance(item, Piece):
                yield _event(_chunk(head, Delta(content=item.text)))
                continue
            last = _chunk(head, Delta())
            last["choices"][0]["finish_reason"] = item.finish_reason
            last["timings"] = _timings(item).model_dump()
            yield _event(last)
            if includes_usage:
                yield _event(_document(head, [], _usage(head, item)))
        yield {"data": _DONE}
    except RequestError as error:
        on_error(error)
        yield _event(error.body())


class AnswerEvents(EventSourceResponse):
    """A streamed answer, which tells when it is over, whether it was sent to its end or not."""

    def __init__(
        self,
        content: AsyncIterator[dict[str, str]],
        headers: dict[str, str],
        on_end: Callable[[bool], None],
    ) -> None:
        super().__init__(content, headers=headers, ping=_PING_S, sep="\n")
        self._on_end = on_end
        self._is_whole = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""

        async def send_and_see(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._is_whole = True

        try:
            await super().__call__(scope, receive, send_and_see)
        finally:
            self._on_end(self._is_whole)


async def client_left(request: Request) -> None:
    """Returns when the client has closed the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(document: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(document, ensure_ascii=False, separators=(",", ":"))}


def _chunk(head: ReplyHead, delta: Delta) -> dict[str, Any]:
    return _document(head, [ChunkChoice(delta=delta)], None)


def _document(head: ReplyHead, choices: list[ChunkChoice], usage: Usage | None) -> dict[str, Any]:
    chunk = ChatCompletionChunk(
        id=head.id, created=head.created, model=head.model, choices=choices, usage=usage
    )
    document = chunk.model_dump(exclude_none=True)
    for choice in document["choices"]:
        choice.setdefault("finish_reason", None)
    return document


def _usage(head: ReplyHead, reply: Reply) -> Usage:
    usage = Usage(
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.answer_tokens,
        total_tokens=reply.prompt_tokens + reply.answer_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=reply.cached_tokens),
    )
    if head.first is None:
        return usage
    return EscalatedUsage(**usage.model_dump(), escalation=head.first.usage)


def _timings(reply: Reply) -> ReplyTimings:
    spent = reply.timings
    return ReplyTimings(
        queue_ms=round(spent.queue_ms, 3),
        vision_ms=round(spent.vision_ms, 3),
        prefill_ms=round(spent.prefill_ms, 3),
        decode_ms=round(spent.decode_ms, 3),
    )
