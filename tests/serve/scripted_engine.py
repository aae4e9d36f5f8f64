"""An engine that answers, fails, hangs and dies on command."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from fastvlm_convert.serve.engine import EngineStatus, Piece, Question, Reply, StageTimings
from fastvlm_convert.serve.errors import CancelledError, EngineFailedError, RequestError, UnavailableError

Command = Literal["answer", "fail", "fail_midway", "hang", "die", "bug"]


@dataclass
class ScriptedEngine:
    """Gives the pieces in `pieces`, a step each; implements `Engine`.

    Attributes:
        slots: Questions at once.
        pieces: Of every answer.
        step_s: Between two pieces.
        mean_logprob: Of every answer, for those who want to know.
        commands: What becomes of the next questions; `answer` when they run out.
        questions: All that came.
        given: Pieces given in all.
        most_running: Most questions that ran at once.
    """

    slots: int = 1
    pieces: tuple[str, ...] = ("It ", "is ", "red.")
    step_s: float = 0.0
    mean_logprob: float = 0.0
    commands: list[Command] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    given: int = 0
    running: int = 0
    most_running: int = 0
    is_ready: bool = False
    is_stopping: bool = False

    async def start(self) -> None:
        self.is_ready = True

    async def stop(self) -> None:
        self.is_stopping = True

    async def answer(self, question: Question) -> AsyncIterator[Piece | Reply]:
        self.questions.append(question)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            command = self.commands.pop(0) if self.commands else "answer"
            if command == "die":
                raise UnavailableError("the worker died", code="worker_died", retry_after_s=1.0)
            if command == "fail":
                raise EngineFailedError("the runtime raised an error", code="engine_failed")
            if command == "bug":
                raise IndexError("a mistake of ours")
            for number, text in enumerate(self.pieces, 1):
                if command == "hang" or self.step_s:
                    await self._step(question, command)
                self.given += 1
                yield Piece(text, number)
                if command == "fail_midway":
                    raise EngineFailedError("the runtime raised an error", code="engine_failed")
            logprob = self.mean_logprob if question.wants_logprob else None
            text = "".join(self.pieces)
            yield Reply(text, "stop", 7, 0, len(self.pieces) + 1, StageTimings(), "miss", logprob)
        finally:
            self.running -= 1

    async def _step(self, question: Question, command: Command) -> None:
        """Wait for the next piece, or for ever; ends when nobody waits or the engine stops."""
        waited = 0.0
        while command == "hang" or waited < self.step_s:
            if self.is_stopping:
                raise UnavailableError("the server is shutting down", code="draining", retry_after_s=1.0)
            if question.cancelled.is_set():
                raise CancelledError("the client left", code="cancelled")
            await asyncio.sleep(0.002)
            waited += 0.002

    def status(self) -> EngineStatus:
        slots = self.slots if self.is_ready else 0
        return EngineStatus(self.is_ready, slots, self.running, {"ready": 1}, 0, "a script", {}, {})


def code_of(error: BaseException) -> str:
    """The word for programs of an error that a client gets."""
    assert isinstance(error, RequestError)
    return error.code
