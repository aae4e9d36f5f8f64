"""The default engine: threads of the server itself, each with a sequence of its own over shared weights."""

import asyncio
import queue
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from fastvlm_convert.prompt_cache import PromptCache
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle
from fastvlm_convert.serve.engine import EngineStatus, Piece, Question, Reply, WorkerState
from fastvlm_convert.serve.engines.sequence import answer_question
from fastvlm_convert.serve.errors import CancelledError, EngineFailedError, RequestError, UnavailableError
from fastvlm_convert.serve.served_bundle import ServedBundle


class EmbeddedEngine:
    """Runs a bundle in the server's process.

    Args:
        bundle: The bundle.
        slots: Questions that run at the same time; where the runtime holds one sequence alone, it is one.
        threads: That compute one operation; None leaves it to the runtime.
        cache: What is kept of prompts, or None.
    """

    def __init__(
        self,
        bundle: ServedBundle,
        slots: int,
        threads: int | None = None,
        cache: PromptCache | None = None,
    ) -> None:
        self._bundle = bundle
        self._slots = slots
        self._threads = threads
        self._cache = cache
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix=f"slot-{bundle.name}")
        self._free: queue.SimpleQueue[LoadedModel] = queue.SimpleQueue()
        self._questions: dict[int, Question] = {}
        self._executed_by = ""
        self._is_stopping = False

    async def start(self) -> None:
        """Load the bundle; returns when questions can be answered.

        Raises:
            BundleError: The runtime refuses it.
            MissingDependencyError: The runtime is not installed.
        """
        await asyncio.get_running_loop().run_in_executor(self._pool, self._load)

    def _load(self) -> None:
        # Threads that wait in a busy loop would take the processor from the other slots, and from the server.
        first = load_bundle(
            self._bundle.path,
            self._bundle.target,
            threads=self._threads,
            spinning=False,
        )
        models = [replace(first, cache=self._cache)]
        while len(models) < self._slots and (another := models[0].another()) is not None:
            models.append(another)
        self._slots = len(models)
        for model in models:
            self._free.put(model)
        self._executed_by = first.session.executed_by

    async def stop(self) -> None:
        """End at once: what is still running ends within one token."""
        self._is_stopping = True
        for question in self._questions.values():
            question.cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def answer(self, question: Question) -> AsyncIterator[Piece | Reply]:
        """Run a question; see `Engine.answer`.

        Raises:
            EngineFailedError: The runtime raised an error.
            UnavailableError: The engine stops (`draining`).
            DeadlineError: The deadline passed.
            CancelledError: `question.cancelled` was set.
        """
        if self._is_stopping:
            raise _stops()
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Piece | Reply | None] = asyncio.Queue()

        def run() -> None:
            model = self._free.get()
            try:
                for item in answer_question(model, question):
                    loop.call_soon_threadsafe(items.put_nowait, item)
            finally:
                self._free.put(model)

        work = loop.run_in_executor(self._pool, run)
        work.add_done_callback(lambda _: items.put_nowait(None))
        self._questions[id(question)] = question
        try:
            while (item := await items.get()) is not None:
                yield item
            self._raise_error_of(work)
        finally:
            del self._questions[id(question)]
            if not work.done():  # closed early; the slot is taken until the thread has ended
                question.cancelled.set()
                await asyncio.wait([work])

    def _raise_error_of(self, work: "asyncio.Future[None]") -> None:
        if work.cancelled():  # it had not begun
            raise _stops()
        error = work.exception()
        if error is None:
            return
        if isinstance(error, CancelledError) and self._is_stopping:
            raise _stops()
        if isinstance(error, RequestError):
            raise error
        raise EngineFailedError("the bundle's runtime raised an error", code="engine_failed") from error

    def status(self) -> EngineStatus:
        """How it is now."""
        state: WorkerState = "stopping" if self._is_stopping else "ready" if self._executed_by else "starting"
        is_ready = state == "ready"
        return EngineStatus(
            is_ready=is_ready,
            slots=self._slots if is_ready else 0,
            running=len(self._questions),
            workers={"busy" if is_ready and self._questions else state: 1},
            restarts=0,
            executed_by=self._executed_by,
            cache_bytes={},
            cache_lookups={},
        )


def _stops() -> UnavailableError:
    return UnavailableError("the server is shutting down", code="draining", retry_after_s=5.0)
