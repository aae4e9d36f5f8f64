"""`POST /v1/chat/completions`: from a request's body to its reply, whole or in pieces."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Final, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from fastvlm_convert.serve.accounting import Account
from fastvlm_convert.serve.body import check_values
from fastvlm_convert.serve.conversation import Conversation, read_conversation
from fastvlm_convert.serve.engine import Piece, Reply
from fastvlm_convert.serve.errors import (
    CancelledError,
    EngineFailedError,
    RequestError,
    UnsupportedMediaError,
)
from fastvlm_convert.serve.escalation import Decided, decide
from fastvlm_convert.serve.replies import (
    CACHE_HEADER,
    AnswerEvents,
    ReplyHead,
    client_left,
    events,
    whole_reply,
)
from fastvlm_convert.serve.schema import ChatRequest, read_request
from fastvlm_convert.serve.service import Service

T = TypeVar("T")
Items = AsyncGenerator[Piece | Reply, None]

_JSON: Final = "application/json"


class Chat:
    """Answers requests.

    Args:
        service: The server's.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._closing: set[asyncio.Task[None]] = set()

    async def answer(self, request: Request) -> Response:
        """The reply to a request.

        Raises:
            RequestError: It is not answered.
        """
        service = self._service
        account: Account = request.state.account
        given = await _read(request)
        scope = account.client if service.settings.cache_scope == "key" else ""
        conversation = read_conversation(given, service.settings, scope)
        account.model = service.router.choose(given.model, account.client)
        service.security.scan(conversation.texts, account)
        account.sampling = conversation.sampling
        decided = await self._decided(request, given.model, conversation)
        account.model = decided.bundle
        items = self._watched(account, decided)
        head = ReplyHead(account.request_id, decided.bundle, decided.first, decided.headers)
        if given.stream:
            usage = given.stream_options is not None and bool(given.stream_options.include_usage)
            return await self._streamed(request, items, head, usage)
        return await self._whole(request, items, head)

    async def _decided(self, request: Request, model: str | None, conversation: Conversation) -> Decided:
        """Who answers, and its answer; where that may be escalated, it is known only when there is one.

        Raises:
            RequestError: The first bundle that was asked did not answer.
        """
        service = self._service
        account: Account = request.state.account
        name = account.model or ""
        deadline = account.began + service.settings.timeout_seconds

        def ask(bundle: str, wants_logprob: bool) -> Items:
            one = service.bundles[bundle]
            asked = one.preparing.asked(conversation, account.request_id, deadline, wants_logprob)
            return one.answers.ask(asked)

        escalation = service.escalation
        if escalation is None or not escalation.concerns(service.router, model, name, conversation.sampling):
            return Decided(name, ask(name, False))
        decided = await _unless_left(request, decide(escalation, name, ask))
        service.accounts.escalated(decided)
        return decided

    async def _watched(self, account: Account, decided: Decided) -> Items:
        """The answer's items, noted as they pass; closing it leaves the question."""
        async with (
            aclosing(decided.pieces) as answer,
            aclosing(self._service.accounts.watched(account, answer)) as items,
        ):
            async for item in items:
                yield item

    async def _whole(self, request: Request, items: Items, head: ReplyHead) -> Response:
        async with aclosing(items):
            reply = await _unless_left(request, _last(items))
        document = whole_reply(head, reply)
        return JSONResponse(document.model_dump(), headers={CACHE_HEADER: reply.cache, **head.headers})

    async def _streamed(
        self, request: Request, items: Items, head: ReplyHead, includes_usage: bool
    ) -> Response:
        """A stream, begun when there is something to say: what goes wrong before has its own status."""
        account: Account = request.state.account
        first: Piece | Reply | None = None
        try:
            first = await _unless_left(request, _first(items))
        finally:
            if first is None:
                await items.aclose()

        def failed(error: RequestError) -> None:
            account.error = error

        def end(is_whole: bool) -> None:
            if not is_whole and account.error is None:
                account.error = _left()
            # The response may be cancelled while it ends; a task of its own is not.
            task = asyncio.get_running_loop().create_task(items.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

        stream = events(head, _with_first(first, items), includes_usage, failed)
        return AnswerEvents(stream, {CACHE_HEADER: first.cache, **head.headers}, end)


async def _read(request: Request) -> ChatRequest:
    kind = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    if kind != _JSON:
        raise UnsupportedMediaError(f"the body is to be {_JSON}", code="content_type")
    body = await request.body()
    check_values(body)
    return read_request(body)


async def _with_first(first: Piece | Reply, rest: AsyncIterator[Piece | Reply]) -> Items:
    yield first
    async for item in rest:
        yield item


async def _first(items: Items) -> Piece | Reply:
    return await anext(items)


async def _last(items: Items) -> Reply:
    async for item in items:
        if isinstance(item, Reply):
            return item
    raise EngineFailedError("the engine gave no reply", code="no_reply")


def _left() -> CancelledError:
    return CancelledError("the client left", code="cancelled")


async def _unless_left(request: Request, work: Coroutine[None, None, T]) -> T:
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
        raise _left()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
