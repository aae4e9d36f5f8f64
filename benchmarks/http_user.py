"""A client that costs little beside the server that it loads: one connection, which is kept open."""

import asyncio
import socket
import subprocess
from types import TracebackType
from typing import Self

_READY_S = 120.0
_POLL_S = 0.02


class HttpUser:
    """One user's connection to a server on this machine."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        return await self._ask(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), b"")

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of a reply to JSON."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return await self._ask(head.encode(), body)

    async def _ask(self, head: bytes, body: bytes) -> tuple[int, bytes]:
        self._writer.write(head + body)
        await self._writer.drain()
        reply = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status, _, headers = reply.partition("\r\n")
        (length,) = (
            int(value)
            for name, _, value in (line.partition(":") for line in headers.split("\r\n"))
            if name == "content-length"
        )
        return int(status.split()[1]), await self._reader.readexactly(length)


async def until_answered(port: int, path: str, process: "subprocess.Popen[bytes]") -> None:
    """Returns when a path answers with 200.

    Raises:
        RuntimeError: The process ended, or two minutes were not enough.
    """
    for _ in range(int(_READY_S / _POLL_S)):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            async with HttpUser(port) as user:
                if (await user.get(path))[0] == 200:
                    return
        except OSError:
            pass
        await asyncio.sleep(_POLL_S)
    raise RuntimeError("the server is not ready")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
