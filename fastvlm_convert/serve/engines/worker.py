"""The server's side of one worker process."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import psutil

from fastvlm_convert.errors import WorkerError
from fastvlm_convert.serve.engine import Piece, Question, Reply
from fastvlm_convert.serve.engines.frames import Frame, FrameError, read_frame, write_frame
from fastvlm_convert.serve.engines.worker_messages import (
    NO_CACHES,
    Load,
    caches_of,
    failure_of,
    item_of,
    load_frame,
    question_frame,
)
from fastvlm_convert.serve.engines.worker_stderr import WorkerStderr
from fastvlm_convert.serve.errors import (
    CancelledError,
    DeadlineError,
    RequestError,
    UnavailableError,
)

_LOG: Final = logging.getLogger(__name__)
_POLL_S: Final = 0.02  # how often is looked whether the client left, between pieces
_END_S: Final = 2.0  # from the end of its input until a worker is killed
_LAST_WORDS_S: Final = 1.0  # for what a worker that has ended wrote; a child of its own may hold the pipe
_ALONE: Final = "--engine embedded runs the bundle in the server itself, and says why it does not run"


@dataclass(frozen=True)
class Launch:
    """How workers are started.

    Attributes:
        command: Program and arguments of a worker.
        load: What it runs.
        start_s: Longest time from the start until it is ready.
        hang_s: How long it may go on with a question that nobody waits for; then it hangs, and is killed.
    """

    command: Sequence[str]
    load: Load
    start_s: float = 300.0
    hang_s: float = 30.0


class Worker:
    """One process, from its start to its end.

    Args:
        number: Its place among the workers, for logs.
        launch: How it is started.
        on_change: Called when it became idle, or ended.

    Attributes:
        number: Its place.
        executed_by: What executes the bundle; "" until it is ready.
        caches: The state of its caches after the last question.
        is_stopping: Whether it is to end: then its last question hears `draining`.
    """

    def __init__(self, number: int, launch: Launch, on_change: Callable[[], None]) -> None:
        self.number = number
        self.executed_by = ""
        self.caches = NO_CACHES
        self.is_stopping = False
        self._launch = launch
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._outbox: asyncio.Queue[Frame] = asyncio.Queue()
        self._question: _Running | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stderr = WorkerStderr(number)
        self._has_ended = False
        self._usage: psutil.Process | None = None

    async def start(self) -> None:
        """Start the process and wait until it can answer.

        Raises:
            ConversionError: It cannot load the bundle, or ends or takes too long before it is ready.
        """
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._launch.command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,  # what a terminal sends to the server is the server's
            )
        except OSError as error:  # no memory, or too many processes or open files
            raise WorkerError(
                f"worker {self.number} cannot be started: {error.strerror}", hint=_ALONE
            ) from error
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        said = asyncio.create_task(self._stderr.read(self._process.stderr))
        self._tasks.append(said)
        self._tasks.append(asyncio.create_task(self._write()))
        self._outbox.put_nowait(load_frame(self._launch.load))
        is_ready = False
        try:
            async with asyncio.timeout(self._launch.start_s):
                first = await self._first_frame(self._process.stdout, said)
            is_ready = True
        except TimeoutError as error:
            what = f"worker {self.number} was not ready after {self._launch.start_s:g} s"
            raise WorkerError(what, hint=_ALONE) from error
        finally:
            if not is_ready:
                await self.close(at_once=True)
        with contextlib.suppress(psutil.Error):
            self._usage = psutil.Process(self._process.pid)
        self.executed_by = str(first.fields["executed_by"])
        self._tasks.append(asyncio.create_task(self._read(self._process.stdout)))

    async def _first_frame(self, stdout: asyncio.StreamReader, said: asyncio.Task[None]) -> Frame:
        try:
            frame = await read_frame(stdout)
        except FrameError as error:
            raise WorkerError(f"worker {self.number} is broken: {error}", hint=_ALONE) from error
        if frame is None:
            code = await self._exit_code()
            await asyncio.wait([said], timeout=_LAST_WORDS_S)  # what it said may still be on its way
            raise WorkerError(
                f"worker {self.number} ended with {ending(code)} before it was ready",
                hint=self._stderr.last_words(),
            )
        if frame.kind == "failed":
            raise failure_of(frame)
        return frame

    @property
    def pid(self) -> int | None:
        """Of the process; None before it is started."""
        return self._process.pid if self._process else None

    @property
    def is_idle(self) -> bool:
        """Whether it can take a question."""
        is_alive = bool(self.executed_by) and not (self._has_ended or self.is_stopping)
        return is_alive and self._question is None

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody waits for the question that it runs."""
        return self._question is not None and not self._question.is_left

    @property
    def is_busy(self) -> bool:
        """Whether it runs a question, even one that nobody waits for."""
        return self._question is not None

    @property
    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        with contextlib.suppress(psutil.Error):  # it ended just now
            return int(self._usage.memory_info().rss) if self._usage else 0
        return 0

    @property
    def cpu_s(self) -> float:
        """Processor time of the process, in seconds."""
        with contextlib.suppress(psutil.Error):
            if self._usage:
                times = self._usage.cpu_times()
                return float(times.user + times.system)
        return 0.0

    def answer(self, question: Question) -> AsyncGenerator[Piece | Reply, None]:
        """Run a question; the worker is busy from this call on, and must be idle before it.

        Raises: while iterated, see `Engine.answer`.
        """
        assert self.is_idle
        running = self._question = _Running(question)
        self._outbox.put_nowait(question_frame(question))
        return self._items(running)

    async def _items(self, running: "_Running") -> AsyncGenerator[Piece | Reply, None]:
        watch = asyncio.create_task(running.watch())
        try:
            while True:
                item = await running.items.get()
                if isinstance(item, RequestError):
                    raise item
                check_waiting(running.question)
                yield item
                if isinstance(item, Reply):
                    return
        finally:
            watch.cancel()
            if self._question is running:  # nobody waits; the worker says itself when it is done
                running.is_left = True
                self._outbox.put_nowait(Frame("cancel"))
                asyncio.get_running_loop().call_later(self._launch.hang_s, self._kill_if_hanging, running)

    def _kill_if_hanging(self, running: "_Running") -> None:
        if self._question is running:
            _LOG.error("worker %d hangs: it is killed", self.number)
            self.kill()

    async def _write(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # the end of its output tells
            while True:
                await write_frame(self._process.stdin, await self._outbox.get())

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        try:
            while (frame := await read_frame(stdout)) is not None:
                item = item_of(frame)
                if self._question is not None:
                    self._question.items.put_nowait(item)
                if not isinstance(item, Piece):
                    self.caches = caches_of(frame)
                    self._question = None
                    self._on_change()
        except FrameError as error:
            _LOG.error("worker %d is broken: %s", self.number, error)
            self.kill()

    async def ended(self) -> int:
        """Wait for the end of the process; its exit code. Its question hears that it died."""
        code = await self._exit_code()
        self._has_ended = True
        if reading := self._tasks[2:]:
            await asyncio.wait(reading)  # everything that it still said
        if self._question is not None:
            self._question.items.put_nowait(self._farewell())
            self._question = None
        for task in self._tasks:
            task.cancel()
        self._on_change()
        return code

    async def _exit_code(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    def _farewell(self) -> UnavailableError:
        if self.is_stopping:
            return draining()
        return UnavailableError(
            "the process that ran the question died; ask again",
            code="worker_died",
            retry_after_s=1.0,
        )

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self, at_once: bool = False) -> None:
        """End the process: by the end of its input, and by a kill if it does not go."""
        self.is_stopping = True
        if self._process is None:
            return
        if at_once or self.is_busy:
            self.kill()
        else:
            assert self._process.stdin
            self._process.stdin.close()
        try:
            async with asyncio.timeout(_END_S):
                await self._exit_code()
        except TimeoutError:
            self.kill()
        await self.ended()


class _Running:
    """A question that a worker runs.

    Attributes:
        items: What the worker says about it.
        is_left: Whether nobody waits for it any more.
        question: The question.
    """

    def __init__(self, question: Question) -> None:
        self.items: asyncio.Queue[Piece | Reply | RequestError] = asyncio.Queue()
        self.is_left = False
        self.question = question

    async def watch(self) -> None:
        """Tell once nobody waits, also while the worker says nothing."""
        try:
            while True:
                check_waiting(self.question)
                remaining = self.question.deadline - time.monotonic()
                await asyncio.sleep(min(_POLL_S, max(0.0, remaining)))
        except RequestError as error:
            self.items.put_nowait(error)


def check_waiting(question: Question) -> None:
    """See that somebody waits for a question.

    Raises:
        DeadlineError: The deadline passed.
        CancelledError: The client left.
    """
    if question.cancelled.is_set():
        raise CancelledError("the client left", code="cancelled")
    if time.monotonic() >= question.deadline:
        raise DeadlineError("the answer was not there in time", code="deadline")


def draining() -> UnavailableError:
    """What clients hear when the engine stops."""
    return UnavailableError("the server is shutting down", code="draining", retry_after_s=5.0)


def ending(code: int) -> str:
    """An exit code in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
