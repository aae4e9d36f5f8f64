"""The real server with an engine that says what its questions ask for."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from fastvlm_convert.serve.app import make_app
from fastvlm_convert.serve.engine import EngineStatus, Piece, Question, Reply, StageTimings
from fastvlm_convert.serve.errors import CancelledError, EngineFailedError, UnavailableError
from fastvlm_convert.serve.served_bundle import ServedBundle
from fastvlm_convert.serve.service import make_service
from fastvlm_convert.serve.settings import Settings

PAUSE_S = 0.03
WORDS = ("Six ", "words ", "come ", "one ", "by ", "one.")
HOSTILE = ("<img src=x onerror=alert(1)>", "<script>alert(2)</script>", "</p><b>", " &lt; **bold** ")
TIMINGS = StageTimings(vision_ms=22, prefill_ms=5, decode_ms=12)


class ScriptedEngine:
    """Answers by a word of the question (hostile, endless, fail, break, busy), else with six words."""

    def __init__(self, bundle: ServedBundle, settings: Settings, _cache: object) -> None:
        self._bundle = bundle
        self._slots = settings.slots
        self._running = 0

    async def start(self) -> None:
        """Nothing is loaded."""

    async def stop(self) -> None:
        """Nothing runs on."""

    async def answer(self, question: Question) -> AsyncIterator[Piece | Reply]:
        text = self._bundle.tokenizer.decode([int(token) for token in question.prompt.segments[-1]])
        if "busy" in text:
            raise UnavailableError("many requests wait already", code="queue_full", retry_after_s=7)
        if "fail" in text:
            raise EngineFailedError("the bundle's runtime raised an error", code="engine_failed")
        pieces = HOSTILE if "hostile" in text else WORDS * (1000 if "endless" in text else 1)
        self._running += 1
        try:
            for count, piece in enumerate(pieces, 1):
                if question.cancelled.is_set():
                    raise CancelledError("the client left", code="cancelled")
                if "break" in text and count == 4:
                    raise EngineFailedError("the bundle's runtime raised an error", code="engine_failed")
                yield Piece(piece, count)
                await asyncio.sleep(PAUSE_S)
        finally:
            self._running -= 1
        yield Reply("".join(pieces), "stop", 48, 0, len(pieces), TIMINGS, "miss")

    def status(self) -> EngineStatus:
        return EngineStatus(True, self._slots, self._running, {"ready": 1}, 0, "a script", {}, {})


@contextmanager
def scripted_server(bundles: Sequence[ServedBundle], **settings: object) -> Iterator[str]:
    """Its address, while it runs in a thread."""
    app = make_app(make_service(Settings(**settings), bundles, ScriptedEngine))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
