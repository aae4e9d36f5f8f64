"""A connection that cannot be held open, or made to fill the memory, by a request that is never whole.

uvicorn waits for the head of a request as long as a client likes, and keeps what has come of it, whatever its
length; keys are checked later, when it is whole. The limits of bodies are `body`'s.
"""

import asyncio
from http import HTTPStatus
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 1 << 16
HEAD_S: Final = 20.0
"""Seconds in which a head must arrive, from the connection's begin or its own."""


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a limit of bytes and of time for what is not the content of a body."""

    head_s = HEAD_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  uvicorn's own
        super().__init__(*args, **kwargs)
        self._awaited: asyncio.TimerHandle | None = None
        self._is_in_body = False
        self._head_bytes = 0  # of the head that has begun, or of what ends a body
        self._came_on = False  # whether the parser found anything else in the last bytes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came."""
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """It left."""
        self._expect_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        if self._awaited is None and not self._is_in_body:
            self._expect()
        self._came_on = False
        super().data_received(data)
        # What comes in one call is limited by the event loop, so only what follows it is counted.
        self._head_bytes = 0 if self._came_on else self._head_bytes + len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._came_on = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._came_on = True
        self._is_in_body = True
        self._expect_no_more()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        self._came_on = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._came_on = True
        self._is_in_body = False
        self._expect_no_more()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A response is sent; perhaps before its request was whole, as for one that is too large."""
        super().on_response_complete()
        if self._is_in_body:
            self._expect()

    def _expect(self) -> None:
        """Begin to wait."""
        self._expect_no_more()
        self._awaited = self.loop.call_later(self.head_s, self._waited)

    def _expect_no_more(self) -> None:
        if self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None

    def _waited(self) -> None:
        """Nothing came, or too little."""
        if self._is_answering:  # the next request has time until this one's answer is sent, and more
            self._expect()
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: HTTPStatus) -> None:
        """Close the connection; say why where that cannot be taken for a part of an answer."""
        if self.transport.is_closing():
            return
        if self.cycle is None:
            line = f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            self.transport.write(f"{line}content-length: 0\r\nconnection: close\r\n\r\n".encode())
        self.transport.close()
