"""The way of a question: cache, equal questions in flight, breaker, queue, engine."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.prompt import Prompt
from fastvlm_convert.serve.admission import Admission
from fastvlm_convert.serve.answers import AnswerPath, Answers, Asked
from fastvlm_convert.serve.breaker import Breaker
from fastvlm_convert.serve.caches import AnswerCache, open_answer_cache
from fastvlm_convert.serve.engine import EngineStatus, Piece, Question, Reply, Sampling
from fastvlm_convert.serve.errors import DeadlineError, InvalidRequestError, RequestError
from fastvlm_convert.serve.metrics import Metrics
from fastvlm_convert.serve.settings import Settings
from tests.serve.scripted_engine import ScriptedEngine

TEXT = "It is red."


class Bench:
    """Answers over a scripted engine, and what they counted."""

    def __init__(
        self, engine: ScriptedEngine, cache: AnswerCache | None = None, max_queue: int = 8, failures: int = 5
    ) -> None:
        self.engine = engine
        self.engine.is_ready = True
        self.metrics = Metrics("1", ["m"])
        self.admission = Admission(max_queue, lambda: engine.slots)
        self.breaker = Breaker(failures, 10.0)
        self.answers = Answers("m", AnswerPath(engine, self.admission, self.breaker, cache), self.metrics)

    def asked(self, key: str | None = "k", seconds: float = 5.0, error: RequestError | None = None) -> Asked:
        async def prepare(cancelled: threading.Event) -> Question:
            if error is not None:
                raise error
            prompt = Prompt((np.zeros(7, np.int64),), ())
            return Question("r", prompt, (), Sampling(8), float("inf"), cancelled)

        return Asked("r", key, prepare, time.monotonic() + seconds)

    async def ask(self, key: str | None = "k", **how: float | RequestError | None) -> tuple[list[str], Reply]:
        """Pieces and the reply."""
        pieces, reply = [], None
        async with aclosing(self.answers.ask(self.asked(key, **how))) as items:  # type: ignore[arg-type]
            async for item in items:
                if isinstance(item, Piece):
                    pieces.append(item.text)
                else:
                    reply = item
        assert reply is not None
        return pieces, reply

    async def code(self, key: str | None = "k", **how: float | RequestError | None) -> str:
        """Of the error that asking ends with."""
        with pytest.raises(RequestError) as error:
            await self.ask(key, **how)
        return error.value.code

    def count(self, name: str) -> float:
        """A sample of the metrics."""
        lines = self.metrics.render().decode().splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)


def cache() -> AnswerCache:
    made = open_answer_cache(Settings())
    assert made is not None
    return made


def test_an_answer_comes_in_pieces_and_whole():
    async def main() -> None:
        bench = Bench(ScriptedEngine())
        pieces, reply = await bench.ask()
        assert pieces == ["It ", "is ", "red."]
        assert (reply.text, reply.cache, reply.cached_tokens) == (TEXT, "miss", 0)

    asyncio.run(main())


def test_the_second_equal_question_is_answered_from_the_cache():
    async def main() -> None:
        bench = Bench(ScriptedEngine(), cache())
        await bench.ask()
        pieces, reply = await bench.ask()
        assert len(bench.engine.questions) == 1
        assert pieces == [TEXT]
        assert (reply.text, reply.cache, reply.cached_tokens) == (TEXT, "hit", reply.prompt_tokens)
        assert vars(reply.timings) == {"queue_ms": 0, "vision_ms": 0, "prefill_ms": 0, "decode_ms": 0}
        await bench.ask("other")
        assert len(bench.engine.questions) == 2
        assert bench.count('fastvlm_cache_lookups_total{cache="answer",result="hit"}') == 1
        assert bench.count('fastvlm_cache_lookups_total{cache="answer",result="miss"}') == 2

    asyncio.run(main())


def test_a_question_without_a_key_is_never_cached_nor_shared():
    async def main() -> None:
        bench = Bench(ScriptedEngine(slots=2, step_s=0.01), cache())
        await asyncio.gather(bench.ask(None), bench.ask(None))
        await bench.ask(None)
        assert len(bench.engine.questions) == 3

    asyncio.run(main())


def test_errors_are_not_cached():
    async def main() -> None:
        bench = Bench(ScriptedEngine(commands=["fail"]), cache())
        assert await bench.code() == "engine_failed"
        assert (await bench.ask())[1].cache == "miss"

    asyncio.run(main())


def test_equal_questions_in_flight_are_run_once_and_each_gets_all_pieces():
    async def main() -> None:
        bench = Bench(ScriptedEngine(step_s=0.02))
        first = asyncio.create_task(bench.ask())
        await until(lambda: bench.engine.given == 2)  # a follower that comes late replays, then streams
        others = [asyncio.create_task(bench.ask()) for _ in range(3)]
        answers = await asyncio.gather(first, *others)
        assert len(bench.engine.questions) == 1
        assert [pieces for pieces, _ in answers] == [["It ", "is ", "red."]] * 4
        assert [reply.cache for _, reply in answers] == ["miss", "hit", "hit", "hit"]
        assert bench.count("fastvlm_deduplicated_total") == 3
        await bench.ask()  # nothing is left of the flight
        assert len(bench.engine.questions) == 2

    asyncio.run(main())


def test_a_leader_that_leaves_does_not_end_the_answer_of_its_followers():
    async def main() -> None:
        bench = Bench(ScriptedEngine(step_s=0.02))
        leader = asyncio.create_task(bench.ask())
        await until(lambda: bench.engine.given == 1)
        follower = asyncio.create_task(bench.ask())
        await asyncio.sleep(0.005)
        leader.cancel()
        pieces, _ = await follower
        assert pieces == ["It ", "is ", "red."]

    asyncio.run(main())


def test_an_answer_ends_when_all_have_left_and_a_new_question_starts_anew():
    async def main() -> None:
        bench = Bench(ScriptedEngine(slots=2, step_s=0.02, pieces=("x",) * 1000))
        tasks = [asyncio.create_task(bench.ask()) for _ in range(3)]
        await until(lambda: bench.engine.given == 2)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.sleep(0.03)
        assert bench.engine.running == 1
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        given = bench.engine.given
        bench.engine.pieces = ("y",)
        assert (await bench.ask())[0] == ["y"]  # while the dying one may still run
        await until(lambda: bench.engine.running == 0)
        assert bench.engine.given <= given + 2  # y, and at most one more x
        assert bench.admission.running == 0

    asyncio.run(main())


def test_a_leaders_failure_reaches_its_followers_once():
    async def main() -> None:
        bench = Bench(ScriptedEngine(step_s=0.02, commands=["fail_midway"]))
        tasks = [asyncio.create_task(bench.code()) for _ in range(3)]
        assert await asyncio.gather(*tasks) == ["engine_failed"] * 3
        assert len(bench.engine.questions) == 1
        assert (await bench.ask())[1].text == TEXT

    asyncio.run(main())


def test_a_follower_has_a_deadline_of_its_own_and_so_has_its_leader():
    async def main() -> None:
        bench = Bench(ScriptedEngine(step_s=0.05))
        leader = asyncio.create_task(bench.code(seconds=0.06))
        await asyncio.sleep(0.01)
        follower = asyncio.create_task(bench.ask(seconds=5))
        assert await leader == "deadline"
        assert (await follower)[1].text == TEXT

    asyncio.run(main())


def test_a_hanging_engine_ends_in_a_deadline():
    async def main() -> None:
        bench = Bench(ScriptedEngine(commands=["hang"]))
        with pytest.raises(DeadlineError):
            await bench.ask(seconds=0.05)
        await until(lambda: bench.admission.running == 0)
        assert bench.breaker.state == "closed"

    asyncio.run(main())


def test_a_question_that_waits_in_the_queue_leaves_it_with_its_client():
    async def main() -> None:
        bench = Bench(ScriptedEngine(commands=["hang"]))
        running = asyncio.create_task(bench.ask("a"))
        await until(lambda: bench.engine.running == 1)
        waiting = asyncio.create_task(bench.ask("b"))
        await until(lambda: bench.admission.waiting == 1)
        waiting.cancel()
        await until(lambda: bench.admission.waiting == 0)
        running.cancel()
        await until(lambda: bench.admission.running == 0)
        assert len(bench.engine.questions) == 1

    asyncio.run(main())


def test_cached_answers_are_served_while_the_breaker_is_open():
    async def main() -> None:
        bench = Bench(ScriptedEngine(commands=["answer", "fail", "fail"]), cache(), failures=2)
        await bench.ask("known")
        for number in range(2):
            assert await bench.code(str(number)) == "engine_failed"
        assert bench.breaker.state == "open"
        assert await bench.code("new") == "breaker_open"
        assert len(bench.engine.questions) == 3
        assert (await bench.ask("known"))[1].cache == "hit"

    asyncio.run(main())


@pytest.mark.parametrize("command", ["die", "bug"])
def test_only_errors_of_the_runtime_open_the_breaker(command):
    async def main() -> None:
        bench = Bench(ScriptedEngine(commands=[command] * 3), failures=2)
        codes = [await bench.code(str(n)) for n in range(3)]
        assert codes == [{"die": "worker_died", "bug": "internal"}[command]] * 3
        assert bench.breaker.state == "closed"
        assert bench.admission.running == 0

    asyncio.run(main())


def test_what_waited_while_the_breaker_opened_does_not_reach_the_engine():
    async def run() -> None:
        bench = Bench(ScriptedEngine(commands=["hang", "fail", "fail"], step_s=0.01), failures=2)
        first = asyncio.create_task(bench.ask("first"))
        await until(lambda: bench.engine.running == 1)
        waiting = [asyncio.create_task(bench.code(f"waiting {i}")) for i in range(4)]
        await until(lambda: bench.admission.waiting == 4)
        first.cancel()
        codes = await asyncio.gather(*waiting)
        assert codes == ["engine_failed", "engine_failed", "breaker_open", "breaker_open"]
        assert len(bench.engine.questions) == 3

    asyncio.run(run())


def test_refusals_of_the_request_itself_do_not_open_the_breaker():
    async def main() -> None:
        bench = Bench(ScriptedEngine(), failures=2)
        error = InvalidRequestError("too long", code="context_length_exceeded")
        for number in range(3):
            assert await bench.code(str(number), error=error) == "context_length_exceeded"
        assert bench.breaker.state == "closed"
        assert bench.engine.questions == []

    asyncio.run(main())


def test_a_full_queue_is_told_and_costs_nothing():
    async def main() -> None:
        bench = Bench(ScriptedEngine(commands=["hang"]), max_queue=0)
        running = asyncio.create_task(bench.ask("a"))
        await until(lambda: bench.engine.running == 1)
        assert await bench.code("b") == "queue_full"
        assert bench.breaker.state == "closed"
        running.cancel()
        await until(lambda: bench.admission.running == 0)

    asyncio.run(main())


class AnotherRuntime(ScriptedEngine):
    def status(self) -> EngineStatus:
        return replace(super().status(), executed_by="another script")


def test_answers_do_not_outlive_the_runtime_that_gave_them(tmp_path: Path):
    async def main() -> None:
        first = open_answer_cache(Settings(cache_dir=tmp_path))
        assert first is not None
        await Bench(ScriptedEngine(), first).ask()
        bench = Bench(AnotherRuntime(), first)
        assert (await bench.ask())[1].cache == "miss"
        assert (await bench.ask())[1].cache == "hit"
        await first.close()

    asyncio.run(main())


def test_answers_outlive_the_server_where_a_folder_is_named(tmp_path: Path):
    async def main() -> None:
        settings = Settings(cache_dir=tmp_path)
        first = open_answer_cache(settings)
        assert first is not None
        await Bench(ScriptedEngine(), first).ask()
        await first.close()
        second = open_answer_cache(settings)
        assert second is not None
        bench = Bench(ScriptedEngine(), second)
        assert (await bench.ask())[1].cache == "hit"
        assert bench.engine.questions == []
        await second.close()

    asyncio.run(main())


@pytest.mark.parametrize("steps", range(12))
def test_leaving_in_the_moment_a_piece_comes_ends_the_question(steps):
    """Python 3.11's `wait_for` forgets a cancellation that comes together with its result."""

    class Engine(ScriptedEngine):
        async def _step(self, question: Question, command: str) -> None:
            while not question.cancelled.is_set() and not piece_is_due.is_set():
                await asyncio.sleep(0)
            piece_is_due.clear()
            if question.cancelled.is_set():
                raise DeadlineError("nobody waits", code="deadline")

    piece_is_due = threading.Event()
    engine = Engine(pieces=("x",) * 1_000, step_s=1.0)

    async def leave() -> None:
        bench = Bench(engine)
        asking = asyncio.create_task(bench.ask())
        while not engine.running:
            await asyncio.sleep(0)
        piece_is_due.set()
        for _ in range(steps):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking}, timeout=0.5)
        assert asking.cancelled()

    asyncio.run(leave())
