"""Run the application until it is told to end."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from fastvlm_convert.errors import UsageError
from fastvlm_convert.serve.app import make_app
from fastvlm_convert.serve.connection import GuardedProtocol
from fastvlm_convert.serve.service import Service

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_BACKLOG: Final = 2048
_LAST_WORDS_S: Final = 1.0  # to tell those who get no answer


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that a port that is taken is told before anything is loaded.

    Raises:
        UsageError: The address is not this machine's, or the port is taken or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {host} port {port}: {reason}",
            hint="choose another with --host and --port; --port 0 takes a free one",
        ) from error


def server_config(app: FastAPI) -> uvicorn.Config:
    """How the application is run; tests run it so as well."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # uvicorn believes every local client; `trusted_proxies` says who is believed
        timeout_graceful_shutdown=1,
        lifespan="on",
        http=GuardedProtocol,
        ws="none",
    )


def run_server(service: Service, sock: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until a signal; then refuse what is new, finish what is in hand, and return.

    Args:
        service: What is served.
        sock: Where.
        on_ready: Called when questions can be asked.

    Raises:
        ConversionError: A bundle cannot be loaded.
    """

    def on_loaded() -> None:
        if service.lifecycle.failure is not None:
            server.should_exit = True
        elif service.lifecycle.phase == "ready":
            on_ready()

    server = _Server(server_config(make_app(service, on_loaded)), service)
    server.run(sockets=[sock])
    if service.lifecycle.failure is not None:
        raise service.lifecycle.failure


class _Server(uvicorn.Server):
    """uvicorn's server, which closes its sockets at the first signal; this one drains first."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at the first signal, end at the second."""
        self._loop = asyncio.get_running_loop()
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in _SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN  # which nohup asks for
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._service.lifecycle.phase == "draining":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + sig)  # at once: threads in a runtime's call would be waited for
        self._service.lifecycle.phase = "draining"
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        if not await self._service.lifecycle.drained(self._service.settings.drain_seconds):
            await self._service.stop()
            await self._service.lifecycle.drained(_LAST_WORDS_S)
        self.should_exit = True
