"""An engine that answers, fails, hangs and dies on command: what a question is to do is its request's id."""

import asyncio
import os
from collections.abc import AsyncIterator

from fastvlm_convert.errors import BundleError
from fastvlm_convert.serve.engine import EngineStatus, Piece, Question, Reply, StageTimings
from fastvlm_convert.serve.errors import CancelledError, UnsupportedMediaError


class ObedientEngine:
    """Commands: `say N` (N pieces, 0.05 s each), `hang`, `refuse`, `fail`, `die S` (after S seconds)."""

    def __init__(self) -> None:
        self.running = 0
        self.is_ready = False

    async def start(self) -> None:
        self.is_ready = True

    async def stop(self) -> None:
        self.is_ready = False

    async def answer(self, question: Question) -> AsyncIterator[Piece | Reply]:
        command, _, count = question.request_id.partition(" ")
        self.running += 1
        try:
            yield Piece("I ", 1)
            if command == "refuse":
                raise UnsupportedMediaError("no such pictures", param="messages[0]", code="format")
            if command == "fail":
                raise ZeroDivisionError("a bug")
            if command == "die":
                await asyncio.sleep(float(count or 0))
                os._exit(9)
            steps = int(count) if command == "say" else 10**6
            for step in range(steps):
                await asyncio.sleep(0.05)
                if question.cancelled.is_set():
                    raise CancelledError("nobody waits", code="cancelled")
                yield Piece(f"{step} ", step + 2)
            text = "I " + "".join(f"{step} " for step in range(steps))
            timings = StageTimings(decode_ms=50.0 * steps)
            yield Reply(
                text, "stop", 3, 0, steps + 1, timings, "miss", -0.5 if question.wants_logprob else None
            )
        finally:
            self.running -= 1

    def status(self) -> EngineStatus:
        return EngineStatus(
            is_ready=self.is_ready,
            slots=1,
            running=self.running,
            workers={"ready": 1},
            restarts=0,
            executed_by="obedience",
            cache_bytes={"feature": 7},
            cache_lookups={("feature", "hit"): 1},
        )


def obedient() -> ObedientEngine:
    return ObedientEngine()


def without_bundle() -> ObedientEngine:
    raise BundleError("no bundle here", where="/nowhere")
