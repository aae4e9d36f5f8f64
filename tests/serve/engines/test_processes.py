"""Workers that are processes: the answers of `run`, and what happens when they die, hang or do not start."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fastvlm_convert.errors import BundleError, WorkerError
from fastvlm_convert.serve.engine import Piece, Question, Reply
from fastvlm_convert.serve.engines.processes import COMMAND, ProcessesEngine, Workers
from fastvlm_convert.serve.errors import (
    CancelledError,
    DeadlineError,
    EngineFailedError,
    UnavailableError,
)
from fastvlm_convert.serve.served_bundle import open_served_bundle
from tests.bundles import copy_bundle, edit_manifest
from tests.serve.engines.questions import ENDLESS, Asked, answers_of_run, demo_questions, question

DESCRIBE = Asked("00.png", "Describe the image.")

Work = Callable[[ProcessesEngine], Awaitable[None]]

_SHARED: set[int] = set()  # workers of engines that tests share


def with_engine(bundle: Path, work: Work, **settings: object) -> None:
    """Do something with an engine of its own that is ready."""

    async def run() -> None:
        engine = ProcessesEngine(open_served_bundle(bundle), Workers(**settings))  # type: ignore[arg-type]
        await engine.start()
        children = pids()
        try:
            async with asyncio.timeout(600):
                await work(engine)
        finally:
            await engine.stop()
        assert children
        assert not any(map(psutil.pid_exists, children))

    asyncio.run(run())


@pytest.fixture(scope="module")
def shared(endless_bundle: Path) -> Iterator[Callable[[Work], None]]:
    """Do something with an engine that others use, too; it must be as before afterwards."""
    engine = ProcessesEngine(open_served_bundle(endless_bundle), Workers())
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        _SHARED.update(psutil.Process(pid).pid for pid in pids())

        def run(work: Work) -> None:
            runner.run(asyncio.wait_for(work(engine), 120))  # type: ignore[arg-type]
            assert engine.status().workers == {"ready": 1}
            assert (engine.status().running, engine.status().restarts) == (0, 0)

        yield run
        runner.run(engine.stop())
    _SHARED.clear()


def pids() -> list[int]:
    """The workers that run, but for those of a shared engine."""
    children = psutil.Process().children()
    return [c.pid for c in children if c.pid not in _SHARED and c.status() != psutil.STATUS_ZOMBIE]


async def ask(engine: ProcessesEngine, asked: Question) -> Reply:
    """The answer to a question; its pieces are its text."""
    *pieces, reply = [item async for item in engine.answer(asked)]
    assert isinstance(reply, Reply)
    assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)) == reply.text
    return reply


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that happens elsewhere."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_answers_are_those_of_run(demo_bundle):
    asked = [*demo_questions()[:4], DESCRIBE]

    async def work(engine: ProcessesEngine) -> None:
        replies = [await ask(engine, question(demo_bundle, one)) for one in asked]
        assert [reply.text for reply in replies] == answers_of_run(demo_bundle, asked)
        assert {reply.finish_reason for reply in replies} == {"stop"}
        assert [reply.cache for reply in replies] == ["miss"] * 4 + ["prefix"]  # of a picture that it knows
        assert all(reply.timings.vision_ms > 0 for reply in replies[:4])
        status = engine.status()
        assert (status.is_ready, status.slots, status.running, status.restarts) == (True, 1, 0, 0)
        assert status.workers == {"ready": 1}
        assert status.executed_by.startswith("onnxruntime ")
        assert 50e6 < status.memory_bytes < engine.worker_bytes
        assert status.cache_lookups["feature", "miss"] >= 4
        assert status.cache_bytes["prefix"] > status.cache_bytes["feature"] > 0

    with_engine(demo_bundle, work)


def test_two_workers_answer_at_once_and_each_keeps_its_pictures(demo_bundle):
    async def work(engine: ProcessesEngine) -> None:
        tasks = [
            asyncio.create_task(ask(engine, question(demo_bundle, one)))
            for one in [*demo_questions()[:5], DESCRIBE]
        ]
        await until(lambda: engine.status().workers == {"busy": 2})
        assert engine.status().running == 2
        texts = [(await task).text for task in tasks]
        assert texts == answers_of_run(demo_bundle, [*demo_questions()[:5], DESCRIBE])

        # All questions about one picture go to one worker while it is idle: it is encoded once.
        for one in demo_questions()[5:11]:
            await ask(engine, question(demo_bundle, one))
            repeated = await ask(engine, question(demo_bundle, one))
            assert repeated.cache == "prefix"
            assert repeated.cached_tokens > 16

    with_engine(demo_bundle, work, min_workers=2, max_workers=2)


def test_settings_of_a_question_reach_the_worker(demo_bundle):
    async def work(engine: ProcessesEngine) -> None:
        whole = (await ask(engine, question(demo_bundle, DESCRIBE))).text
        short = await ask(engine, question(demo_bundle, DESCRIBE, max_tokens=5))
        assert (short.finish_reason, short.answer_tokens) == ("length", 5)
        stopped = await ask(engine, question(demo_bundle, DESCRIBE, stop=(" heart",)))
        assert stopped.text == whole[: whole.index(" heart")]
        asked = replace(question(demo_bundle, DESCRIBE), wants_logprob=True)
        assert -1 < ((await ask(engine, asked)).mean_logprob or 1) < 0
        # What is counted on before the start is enough for what it takes, and not twice as much.
        assert engine.status().memory_bytes < engine.worker_bytes < 2 * engine.status().memory_bytes

    with_engine(demo_bundle, work, feature_cache_bytes=0, prefix_cache_bytes=0)


def test_a_killed_worker_loses_the_question_that_it_ran_and_no_other(endless_bundle):
    async def work(engine: ProcessesEngine) -> None:
        running = engine.answer(question(endless_bundle, DESCRIBE, max_tokens=ENDLESS))
        await anext(running)
        (pid,) = pids()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UnavailableError) as caught:
            await _exhaust(running)
        assert caught.value.code == "worker_died"
        assert 0.5 < caught.value.retry_after_s < 30
        assert not engine.status().is_ready

        reply = await ask(engine, question(endless_bundle, DESCRIBE))  # waits for the new worker
        assert [reply.text] == answers_of_run(endless_bundle, [DESCRIBE])
        assert engine.status().restarts == 1
        assert pids() != [pid]

    with_engine(endless_bundle, work)


async def _exhaust(items) -> None:
    async for _ in items:
        pass


def test_a_worker_that_hangs_is_killed_after_the_deadline(demo_bundle):
    async def work(engine: ProcessesEngine) -> None:
        (pid,) = pids()
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            await ask(engine, question(demo_bundle, DESCRIBE, seconds=0.5))
        assert time.monotonic() - began < 3
        assert engine.status().slots == 0  # nobody is sent to it
        await until(lambda: pids() != [pid])
        await ask(engine, question(demo_bundle, DESCRIBE))

    with_engine(demo_bundle, work, hang_s=0.2)


@pytest.mark.parametrize("how", ["event", "close", "task"])
def test_a_cancelled_question_frees_its_worker_at_once(shared, endless_bundle, how):
    async def work(engine: ProcessesEngine) -> None:
        asked = question(endless_bundle, DESCRIBE, max_tokens=ENDLESS)
        items = engine.answer(asked)
        await anext(items)
        if how == "event":
            asked.cancelled.set()
            with pytest.raises(CancelledError):
                await _exhaust(items)
        elif how == "close":
            await items.aclose()
        else:
            task = asyncio.create_task(_exhaust(items))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        began = time.monotonic()
        await until(lambda: engine.status().workers == {"ready": 1})
        assert time.monotonic() - began < 0.5  # the whole answer takes longer
        assert (engine.status().running, engine.status().restarts) == (0, 0)
        await ask(engine, question(endless_bundle, DESCRIBE))

    shared(work)


def test_the_deadline_ends_an_answer(shared, endless_bundle):
    async def work(engine: ProcessesEngine) -> None:
        await ask(engine, question(endless_bundle, DESCRIBE))
        with pytest.raises(DeadlineError):
            await _exhaust(engine.answer(question(endless_bundle, DESCRIBE, seconds=0.3, max_tokens=ENDLESS)))
        await until(lambda: engine.status().workers == {"ready": 1})

    shared(work)


def test_a_failure_of_the_runtime_is_told_and_the_worker_goes_on(shared, endless_bundle):
    async def work(engine: ProcessesEngine) -> None:
        asked = question(endless_bundle, DESCRIBE)
        small = replace(asked.prompt, images=(asked.prompt.images[0][:, :, :7, :7],))
        with pytest.raises(EngineFailedError, match="ONNX Runtime refuses"):
            await ask(engine, replace(asked, prompt=small, image_keys=("small",)))
        await ask(engine, asked)
        assert engine.status().restarts == 0

    shared(work)


def test_who_waits_longest_is_next(shared, endless_bundle):
    async def work(engine: ProcessesEngine) -> None:
        ended: list[int] = []

        async def user(number: int, times: int) -> None:
            for _ in range(times):
                await ask(engine, question(endless_bundle, DESCRIBE, max_tokens=20))
                ended.append(number)

        hasty = asyncio.create_task(user(0, 4))  # asks again as soon as it has an answer
        await asyncio.sleep(0)
        others = [asyncio.create_task(user(number, 1)) for number in (1, 2, 3)]
        await asyncio.gather(hasty, *others)
        assert ended == [0, 1, 2, 3, 0, 0, 0]

    shared(work)


def test_stopping_tells_what_runs_and_what_waits(endless_bundle):
    async def work(engine: ProcessesEngine) -> None:
        running = engine.answer(question(endless_bundle, DESCRIBE, max_tokens=ENDLESS))
        await anext(running)
        waiting = asyncio.create_task(ask(engine, question(endless_bundle, DESCRIBE)))
        await asyncio.sleep(0.05)
        await engine.stop()
        for end in (_exhaust(running), waiting):
            with pytest.raises(UnavailableError) as caught:
                await end
            assert caught.value.code == "draining"

    with_engine(endless_bundle, work)


def test_signals_of_a_terminal_leave_workers_alone(demo_bundle):
    async def work(engine: ProcessesEngine) -> None:
        (pid,) = pids()
        assert os.getpgid(pid) != os.getpgid(0)
        running = asyncio.create_task(ask(engine, question(demo_bundle, DESCRIBE)))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert (await running).text
        assert pids() == [pid]

    with_engine(demo_bundle, work)


def test_a_bundle_that_cannot_be_loaded_is_an_error_at_the_start(demo_bundle, tmp_path):
    from tests.bundles import copy_bundle, graph_path

    bundle = copy_bundle(demo_bundle, tmp_path)
    served = open_served_bundle(bundle)
    graph = graph_path(bundle, "decoder")
    whole = graph.read_bytes()

    async def start() -> None:
        engine = ProcessesEngine(served, Workers())
        graph.write_bytes(whole[:-100])
        with pytest.raises(BundleError):
            await engine.start()
        assert pids() == []

    asyncio.run(start())


def script(folder: Path, text: str) -> tuple[str, ...]:
    """A program in place of a worker; `become_a_worker()` in it goes on as one."""
    path = folder / "worker.py"
    path.write_text(
        "import os, sys, time\n"
        f"def become_a_worker():\n    os.execv({COMMAND[0]!r}, {list(COMMAND)!r})\n"
        f"once = os.path.join({str(folder)!r}, 'once')\n{text}\n"
    )
    return sys.executable, str(path)


def test_a_worker_that_crashes_at_the_start_is_an_error_with_its_last_words(demo_bundle, tmp_path):
    command = script(tmp_path, "print('no luck today', file=sys.stderr)\nsys.exit(3)")

    async def start() -> None:
        engine = ProcessesEngine(open_served_bundle(demo_bundle), Workers(command=command))
        with pytest.raises(WorkerError, match="ended with exit code 3 before it was ready") as caught:
            await engine.start()
        assert caught.value.hint == "no luck today"

    asyncio.run(start())


def test_a_worker_that_prints_where_frames_belong_is_an_error(demo_bundle, tmp_path):
    command = script(tmp_path, "print('hello' * 100)\ntime.sleep(60)")

    async def start() -> None:
        engine = ProcessesEngine(open_served_bundle(demo_bundle), Workers(command=command))
        with pytest.raises(WorkerError, match="is broken"):
            await engine.start()

    asyncio.run(start())


def test_a_slow_start_is_waited_for_but_not_for_ever(demo_bundle, tmp_path):
    slow = script(tmp_path, "time.sleep(1)\nbecome_a_worker()")

    async def work(engine: ProcessesEngine) -> None:
        await ask(engine, question(demo_bundle, DESCRIBE))

    with_engine(demo_bundle, work, command=slow)

    async def start() -> None:
        workers = Workers(command=script(tmp_path, "time.sleep(60)"), start_s=0.5)
        engine = ProcessesEngine(open_served_bundle(demo_bundle), workers)
        with pytest.raises(WorkerError, match=r"not ready after 0\.5 s"):
            await engine.start()

    asyncio.run(start())


def test_a_worker_that_no_longer_starts_makes_the_engine_not_ready(demo_bundle, tmp_path):
    starts = tmp_path / "starts"
    command = script(
        tmp_path,
        f"open({str(starts)!r}, 'a').write('x')\n"
        "if os.path.exists(once): sys.exit(3)\n"
        "open(once, 'w')\nbecome_a_worker()",
    )

    async def work(engine: ProcessesEngine) -> None:
        (pid,) = pids()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: engine.status().restarts == 2)  # after 0.5 and 1 s
        await asyncio.sleep(1)
        status = engine.status()
        assert (status.is_ready, status.slots, status.workers) == (False, 0, {"restarting": 1})
        assert len(starts.read_text()) == 3  # it does not loop
        with pytest.raises(UnavailableError) as caught:
            await ask(engine, question(demo_bundle, DESCRIBE, seconds=0.3))
        assert caught.value.code == "loading"
        assert caught.value.retry_after_s >= 1

    with_engine(demo_bundle, work, command=command)


def test_workers_end_with_their_server(endless_bundle):
    """Even one that was killed, and even in the middle of an answer."""
    program = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.serve.engines.test_processes import *
bundle = Path(sys.argv[1])

async def main():
    engine = ProcessesEngine(open_served_bundle(bundle), Workers(min_workers=2, max_workers=2))
    await engine.start()
    items = engine.answer(question(bundle, DESCRIBE, max_tokens=ENDLESS))
    await anext(items)
    print(*pids(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", program, endless_bundle],
        stdout=subprocess.PIPE,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    ended = time.monotonic()
    children = [int(pid) for pid in done.stdout.split()]
    assert len(children) == 2
    while any(map(psutil.pid_exists, children)):
        assert time.monotonic() - ended < 2
        time.sleep(0.01)


def test_scaling_adds_workers_and_lets_busy_ones_finish(endless_bundle):
    async def work(engine: ProcessesEngine) -> None:
        await engine.scale_to(2)
        assert engine.status().workers == {"ready": 2}
        running = [engine.answer(question(endless_bundle, DESCRIBE, max_tokens=600)) for _ in range(2)]
        for items in running:
            await anext(items)
        fewer = asyncio.create_task(engine.scale_to(1))
        await until(lambda: engine.status().workers == {"busy": 1, "stopping": 1})
        assert engine.status().slots == 2  # both still run
        assert not fewer.done()
        ends = await asyncio.gather(*(_last(items) for items in running))
        assert all(isinstance(end, Reply) for end in ends)
        await fewer
        assert engine.status().workers == {"ready": 1}
        assert len(pids()) == 1
        await ask(engine, question(endless_bundle, DESCRIBE))

    with_engine(endless_bundle, work, max_workers=2)


async def _last(items) -> object:
    async for item in items:
        last = item
    return last


def test_kills_under_load_lose_only_what_was_in_flight(demo_bundle, request):
    """Long with `--soak`: a kill every 20 s for 5 minutes."""
    pause, kills = (20.0, 15) if request.config.getoption("--soak") else (1.5, 3)
    asked = demo_questions()[:6]
    expected = answers_of_run(demo_bundle, asked)

    async def work(engine: ProcessesEngine) -> None:
        over = asyncio.Event()
        answered, lost, other = 0, 0, 0

        async def user(number: int) -> None:
            nonlocal answered, lost, other
            turn = number
            while not over.is_set():
                turn = (turn + 1) % len(asked)
                try:
                    reply = await ask(engine, question(demo_bundle, asked[turn]))
                except UnavailableError as error:
                    lost += error.code == "worker_died"
                    other += error.code != "worker_died"
                    continue
                assert reply.text == expected[turn]
                answered += 1

        users = [asyncio.create_task(user(n)) for n in range(4)]
        for n in range(kills):
            await asyncio.sleep(pause)
            alive = pids()
            os.kill(alive[n % len(alive)], signal.SIGKILL)
        await asyncio.sleep(pause)
        over.set()
        await asyncio.gather(*users)
        assert lost <= kills  # a worker has one question
        assert other == 0
        assert answered > 4 * kills
        await until(lambda: engine.status().workers == {"ready": 2}, 60)
        assert engine.status().restarts == kills

    with_engine(demo_bundle, work, min_workers=2, max_workers=2)


def test_a_worker_that_the_system_cannot_start_is_tried_again(demo_bundle, tmp_path):
    program, away = tmp_path / "python", tmp_path / "away"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o700)

    async def work(engine: ProcessesEngine) -> None:
        (pid,) = pids()
        program.rename(away)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: engine.status().back_in_s is not None)
        away.rename(program)
        await until(lambda: engine.status().is_ready)
        assert engine.status().back_in_s is None
        assert (await ask(engine, question(demo_bundle, DESCRIBE))).text

    with_engine(demo_bundle, work, command=(str(program), *COMMAND[1:]))


def test_a_worker_does_not_come_back_with_another_bundle(demo_bundle, tmp_path):
    served, other = copy_bundle(demo_bundle, tmp_path), copy_bundle(demo_bundle, tmp_path / "other")
    edit_manifest(other, lambda manifest: manifest.update(created_with="another"))
    first = tmp_path / "first"

    async def work(engine: ProcessesEngine) -> None:
        (pid,) = pids()
        served.rename(first)
        other.rename(served)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: engine.status().back_in_s is not None)
        assert not engine.status().is_ready
        served.rename(other)
        first.rename(served)
        await until(lambda: engine.status().is_ready)

    with_engine(served, work)
