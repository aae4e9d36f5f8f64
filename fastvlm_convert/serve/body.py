"""The bodies of requests: limited while they arrive."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvlm_convert.amounts import size_text
from fastvlm_convert.serve.errors import (
    CancelledError,
    InvalidRequestError,
    SlowBodyError,
    TooLargeError,
    UnavailableError,
)
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.serve.validate import BYTES_PER_MB

MAX_VALUES: Final = 100_000  # of a JSON document: a byte of `[[],[],` becomes sixty of memory
_JSON_AROUND_TEXT: Final = 1 << 20
_BYTES_PER_CHAR: Final = 12  # in JSON, as two escapes
_BODIES_AT_ONCE: Final = 4
_MAX_DIGITS: Final = 20


def body_limit(settings: Settings) -> int:
    """Most bytes of a body: its pictures in base64, its texts, and some more for JSON."""
    pictures = settings.max_images * settings.max_image_size_mb * BYTES_PER_MB * 4 / 3
    return int(pictures) + settings.max_question_chars * _BYTES_PER_CHAR + _JSON_AROUND_TEXT


class BodyLimit:
    """ASGI middleware that reads bodies, and refuses those that are too large as soon as that is known.

    Refusals are raised, for the middleware around it to answer.

    The application is called when a body is whole. Bodies of all requests together are limited, too, so that
    many uploads at a time cannot fill the memory.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, max_bytes_at_once: int | None = None, seconds: float = 30.0
    ) -> None:
        """Stand before an application.

        Args:
            app: The application.
            max_bytes: Of one body.
            max_bytes_at_once: Of all bodies whose requests are not answered yet; four times as much if None.
            seconds: In which a body must arrive.
        """
        self._app = app
        self._max_bytes = max_bytes
        self._max_at_once = max_bytes_at_once or _BODIES_AT_ONCE * max_bytes
        self._seconds = seconds
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer.

        Raises:
            TooLargeError: The body is too large.
            UnavailableError: All bodies together are.
            SlowBodyError: It did not arrive in time.
            CancelledError: The client left before it was whole.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._check_length(scope)
        body = _Body()
        try:
            await self._read(receive, body)
            await self._app(scope, _replayed(body.chunks, receive), send)
        finally:
            self._held -= body.size

    async def _read(self, receive: Receive, body: "_Body") -> None:
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in _chunks(receive):
                    body.chunks.append(chunk)
                    body.size += len(chunk)
                    self._held += len(chunk)
                    self._check_held(body.size)
        except TimeoutError:
            message = f"the body did not arrive within {self._seconds:g} seconds"
            raise SlowBodyError(message, code="slow_body") from None

    @property
    def held(self) -> int:
        """Bytes of bodies whose requests are being read or answered."""
        return self._held

    def _check_length(self, scope: Scope) -> None:
        """Refuse a body for what its header says; what it does not say is counted later.

        Raises:
            TooLargeError: It says too much.
            InvalidRequestError: It says no number.
        """
        length = Headers(scope=scope).get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < _MAX_DIGITS):
            raise InvalidRequestError("Content-Length is no sensible number", code="bad_content_length")
        if int(length) > self._max_bytes:
            raise self._too_large()

    def _check_held(self, held: int) -> None:
        """Refuse a body for what is there of it.

        Raises:
            TooLargeError: It is too large.
            UnavailableError: All bodies together are.
        """
        if held > self._max_bytes:
            raise self._too_large()
        if self._held > self._max_at_once:
            raise UnavailableError(
                "too many large requests at a time; try again in a moment",
                code="queue_full",
                retry_after_s=1.0,
            )

    def _too_large(self) -> TooLargeError:
        return TooLargeError(
            f"the body is larger than {size_text(self._max_bytes)}; send fewer or smaller pictures",
            code="body_too_large",
        )


@dataclass
class _Body:
    """What is there of a body.

    Attributes:
        chunks: As they came, until the application takes them.
        size: Bytes of all that came.
    """

    chunks: deque[bytes] = field(default_factory=deque)
    size: int = 0


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    """What arrives of a body.

    Raises:
        CancelledError: The client left.
    """
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CancelledError("the client left", code="cancelled")
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _replayed(chunks: deque[bytes], receive: Receive) -> Receive:
    """A `receive` that gives the chunks, letting go of each, and then what really comes."""
    is_whole = False

    async def replay() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()
        body = chunks.popleft() if chunks else b""
        is_whole = not chunks
        return {"type": "http.request", "body": body, "more_body": not is_whole}

    return replay


def check_values(body: bytes) -> None:
    """See that a body has no more values than requests have, before it is read as JSON.

    Raises:
        InvalidRequestError: It has.
    """
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:
        raise InvalidRequestError(
            f"the body has more than {MAX_VALUES} commas and brackets", code="too_many_values"
        )
