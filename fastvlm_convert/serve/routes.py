"""The paths of the server."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from fastvlm_convert.serve.answers import Asked
from fastvlm_convert.serve.conversation import asked, key_of, read_sampling, read_turns
from fastvlm_convert.serve.engine import Piece, Reply
from fastvlm_convert.serve.errors import CancelledError, UnsupportedMediaError
from fastvlm_convert.serve.replies import (
    CACHE_HEADER,
    AnswerEvents,
    ReplyHead,
    client_left,
    events,
    whole_reply,
)
from fastvlm_convert.serve.schema import (
    ChatCompletion,
    ChatRequest,
    ErrorReply,
    ModelCard,
    ModelList,
    read_request,
)
from fastvlm_convert.serve.service import BundleService, Service

Result = TypeVar("Result")

_JSON: Final = "application/json"
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "The request is malformed, or asks for what is not offered."},
    401: {"description": "There is no key, or not a known one."},
    404: {"description": "There is no such model."},
    413: {"description": "The body or a picture is too large."},
    415: {"description": "The body is no JSON, or a picture is of a format that is not taken."},
    422: {"description": "A picture cannot be decoded."},
    429: {"description": "Too many requests of one client; see Retry-After."},
    500: {"description": "The bundle's runtime raised an error."},
    503: {"description": "Not now; see Retry-After."},
    504: {"description": "The answer was not there in time."},
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {**_ERRORS[status], "model": ErrorReply} for status in statuses}


def make_router(service: Service) -> APIRouter:
    """The routes of a service."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={
            200: {"content": {"text/event-stream": {}}},
            **_errors(*(status for status in _ERRORS if isinstance(status, int))),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {_JSON: {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
            }
        },
    )
    async def chat_completions(request: Request) -> Response:
        """Answer the last message of a conversation."""
        return await _answer(service, request)

    @router.get("/v1/models", responses=_errors(401, 503))
    async def models() -> ModelList:
        """The bundles that are served."""
        return ModelList(data=[_card(service, one) for one in service.bundles.values()])

    @router.get("/v1/models/{name:path}", responses=_errors(401, 404, 503))
    async def model(name: str) -> ModelCard:
        """A bundle that is served."""
        return _card(service, service.chosen(name))

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        """Whether the server's process is alive."""
        return {"status": "alive"}

    @router.get("/readyz", responses={503: {"description": "Loading, or about to end."}})
    async def readyz() -> Response:
        """Whether questions can be asked."""
        phase = service.lifecycle.phase
        return JSONResponse({"status": phase}, 200 if phase == "ready" else 503)

    return router


def _card(service: Service, one: BundleService) -> ModelCard:
    return ModelCard(id=one.bundle.name, created=int(service.started_at))


async def _answer(service: Service, request: Request) -> Response:
    deadline = time.monotonic() + service.settings.timeout_seconds
    given = await _read(request)
    one = service.chosen(given.model)
    turns, sampling = read_turns(given), read_sampling(given, service.settings)
    request_id: str = request.state.request_id
    key = key_of(one.bundle, turns, sampling, service.settings, "")
    question = asked(one.bundle, turns, sampling, request_id, deadline, key)
    head = ReplyHead(request_id, one.bundle.name)
    if given.stream:
        usage = given.stream_options is not None and bool(given.stream_options.include_usage)
        return await _streamed(request, one, question, head, usage)
    return await _whole(request, one, question, head)


async def _read(request: Request) -> ChatRequest:
    kind = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    if kind != _JSON:
        raise UnsupportedMediaError(f"the body is {_JSON}, not what content-type says", code="content_type")
    return read_request(await request.body())


async def _whole(request: Request, one: BundleService, question: Asked, head: ReplyHead) -> Response:
    async with aclosing(one.answers.ask(question)) as items:
        reply = await _unless_left(request, _last(items))
    document = whole_reply(head, reply)
    return JSONResponse(document.model_dump(), headers={CACHE_HEADER: reply.cache})


async def _streamed(
    request: Request, one: BundleService, question: Asked, head: ReplyHead, includes_usage: bool
) -> Response:
    """The stream begins when there is something to say: what goes wrong before has a status of its own."""
    items = one.answers.ask(question)
    is_open = False
    try:
        first = await _unless_left(request, _first(items))
        is_open = True
    finally:
        if not is_open:
            await items.aclose()

    def end() -> None:
        # The response may be cancelled while it ends; a task of its own is not.
        task = asyncio.get_running_loop().create_task(items.aclose())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    stream = events(head, _with_first(first, items), includes_usage, lambda error: None)
    return AnswerEvents(stream, {CACHE_HEADER: first.cache}, end)


_closing: set[asyncio.Task[None]] = set()


async def _with_first(
    first: Piece | Reply, rest: AsyncIterator[Piece | Reply]
) -> AsyncIterator[Piece | Reply]:
    yield first
    async for item in rest:
        yield item


async def _last(items: AsyncIterator[Piece | Reply]) -> Reply:
    reply: Reply | None = None
    async for item in items:
        if isinstance(item, Reply):
            reply = item
    assert reply is not None
    return reply


async def _first(items: AsyncIterator[Piece | Reply]) -> Piece | Reply:
    return await anext(items)


async def _unless_left(request: Request, work: Coroutine[None, None, Result]) -> Result:
    """The result of some work, which is given up when the client leaves.

    Raises:
        CancelledError: The client left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(client_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise CancelledError("the client left", code="cancelled")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
