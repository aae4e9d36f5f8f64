"""The engine over Ray Serve: its router, its queue and its replicas, and the same answers."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_convert.demo.samples import make_sample
from fastvlm_convert.errors import MissingDependencyError, UsageError, WorkerError
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.serve.engine import Piece, Question, Reply, Sampling
from fastvlm_convert.serve.engines.embedded import EmbeddedEngine
from fastvlm_convert.serve.engines.ray import RayEngine
from fastvlm_convert.serve.engines.ray_cluster import RaySettings, deploy
from fastvlm_convert.serve.engines.ray_replica import embedded
from fastvlm_convert.serve.errors import (
    CancelledError,
    DeadlineError,
    EngineFailedError,
    RequestError,
    UnavailableError,
    UnsupportedMediaError,
)
from fastvlm_convert.serve.served_bundle import open_served_bundle
from fastvlm_convert.serve.settings import Settings
from tests.serve.engines.obedient import obedient, without_bundle
from tests.serve.needs_ray import HAS_RAY, needs_ray

EMPTY = Prompt((np.zeros(1, np.int64),), ())
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def question(command: str, seconds: float = 30.0, wants_logprob: bool = False) -> Question:
    sampling = Sampling(max_tokens=8)
    deadline = time.monotonic() + seconds
    return Question(command, EMPTY, (), sampling, deadline, wants_logprob=wants_logprob)


async def answer(engine: Any, asked: Question) -> list[Piece | Reply]:
    return [item async for item in engine.answer(asked)]


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def home(ray_home: dict[str, str]) -> Iterator[Path]:
    """Ray's folder, for this process and those that it starts."""
    before = {name: os.environ.get(name) for name in ray_home}
    os.environ |= ray_home
    yield Path(ray_home["HOME"])
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def run(home: Path) -> Iterator[Run]:
    """Runs coroutines in one event loop, as a server does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(120)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def engine(run: Run) -> Iterator[RayEngine]:
    """One replica with one slot, and room for two in the queue."""
    settings = RaySettings("obedient", slots=1, max_queue=2)
    engine = RayEngine(settings, partial(deploy, obedient, settings))
    run(engine.start())
    yield engine
    run(engine.stop())


@pytest.mark.slow
@needs_ray
class TestObedient:
    def test_pieces_come_one_by_one_and_the_reply_last(self, run: Run, engine: RayEngine) -> None:
        async def times() -> list[float]:
            return [time.monotonic() async for _ in engine.answer(question("say 6"))]

        came = run(times())
        assert came[-1] - came[0] > 0.2  # streamed, and not at the end
        *pieces, last = run(answer(engine, question("say 3", wants_logprob=True)))
        assert [type(piece) for piece in pieces] == [Piece] * 4
        assert "".join(piece.text for piece in pieces) == last.text == "I 0 1 2 "
        assert (last.mean_logprob, last.answer_tokens) == (-0.5, 4)
        assert last.timings.decode_ms == 150.0
        assert 0 < last.timings.queue_ms < 5000

    def test_its_status_tells_what_runs_and_waits(self, run: Run, engine: RayEngine) -> None:
        async def look() -> None:
            tasks = [asyncio.create_task(answer(engine, question("say 20")))]
            await until(lambda: engine.status().running == 1)
            tasks += [asyncio.create_task(answer(engine, question("say 2"))) for _ in range(2)]
            await until(lambda: engine.status().waiting == 2)
            status = engine.status()
            assert (status.running, status.waiting, status.workers) == (1, 2, {"busy": 1})
            assert status.slots > 1000  # admission must not queue before Ray's queue
            await asyncio.gather(*tasks)

        run(look())
        status = engine.status()
        assert (status.running, status.waiting, status.workers) == (0, 0, {"ready": 1})
        assert status.is_ready
        assert status.executed_by == "obedience"
        assert status.cache_bytes == {"feature": 7}
        assert status.memory_bytes > 20e6

    def test_a_question_beyond_ray_s_queue_is_refused_at_once(self, run: Run, engine: RayEngine) -> None:
        async def crowd() -> list[Any]:
            first = asyncio.create_task(answer(engine, question("say 20")))
            await until(lambda: engine.status().running == 1)
            asked = [answer(engine, question("say 2")) for _ in range(4)]
            return await asyncio.gather(first, *asked, return_exceptions=True)

        results = run(crowd())
        refused = [error for error in results if isinstance(error, UnavailableError)]
        assert len(refused) == 2
        assert all(error.code == "queue_full" and error.retry_after_s >= 1 for error in refused)
        assert sum(isinstance(result, list) for result in results) == 3
        assert engine.status().waiting == 0

    @pytest.mark.parametrize("way", ["event", "close", "task"])
    def test_a_client_that_leaves_frees_the_slot(self, way: str, run: Run, engine: RayEngine) -> None:
        async def leave() -> float:
            asked = question("hang")
            items = engine.answer(asked)
            assert await anext(items) == Piece("I ", 1)
            began = time.monotonic()
            if way == "event":
                asked.cancelled.set()
                with pytest.raises(CancelledError):
                    async for _ in items:
                        pass
            elif way == "close":
                await items.aclose()
            else:
                task = asyncio.create_task(anext(items))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            await answer(engine, question("say 0"))  # there is one slot
            return time.monotonic() - began

        assert run(leave()) < 5
        assert engine.status().running == 0

    def test_a_client_that_leaves_while_it_waits_leaves_the_queue(self, run: Run, engine: RayEngine) -> None:
        async def leave() -> None:
            first = asyncio.create_task(answer(engine, question("say 30")))
            await until(lambda: engine.status().running == 1)
            waiting = [question("hang") for _ in range(2)]
            tasks = [asyncio.create_task(answer(engine, asked)) for asked in waiting]
            await until(lambda: engine.status().waiting == 2)
            for asked in waiting:
                asked.cancelled.set()
            for task in tasks:
                with pytest.raises(CancelledError):
                    await task
            assert engine.status().waiting == 0
            await asyncio.gather(first, answer(engine, question("say 0")))

        run(leave())

    def test_a_deadline_ends_a_question(self, run: Run, engine: RayEngine) -> None:
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            run(answer(engine, question("hang", seconds=0.5)))
        assert time.monotonic() - began < 2
        run(answer(engine, question("say 0")))
        with pytest.raises(DeadlineError):
            run(answer(engine, question("say 0", seconds=-1)))

    def test_errors_for_clients_arrive_as_they_were_raised(self, run: Run, engine: RayEngine) -> None:
        with pytest.raises(UnsupportedMediaError) as caught:
            run(answer(engine, question("refuse")))
        assert caught.value == UnsupportedMediaError("no such pictures", "messages[0]", "format")

    def test_other_errors_are_failures_of_the_runtime(self, run: Run, engine: RayEngine) -> None:
        with pytest.raises(EngineFailedError) as caught:
            run(answer(engine, question("fail")))
        assert "a bug" not in str(caught.value)  # the log has it
        assert "ZeroDivisionError" in str(caught.value.__cause__)

    def test_a_replica_that_dies_takes_only_what_it_ran(self, run: Run, engine: RayEngine) -> None:
        restarts = engine.status().restarts

        async def die() -> tuple[UnavailableError, list[Piece | Reply]]:
            dying = asyncio.create_task(answer(engine, question("die 0.5")))
            await until(lambda: engine.status().running == 1)
            waiting = asyncio.create_task(answer(engine, question("say 1", seconds=60)))
            with pytest.raises(UnavailableError) as caught:
                await dying
            return caught.value, await waiting

        error, answered = run(die())
        assert error.code == "worker_died"
        assert 1 <= error.retry_after_s < 30
        assert answered[-1].text == "I 0 "  # Ray started another
        assert engine.status().restarts == restarts + 1

    def test_a_replica_that_dies_before_it_says_a_word_is_noticed(self, run: Run, engine: RayEngine) -> None:
        restarts = engine.status().restarts
        with pytest.raises(UnavailableError) as caught:
            run(answer(engine, question("die")))
        assert caught.value.code == "worker_died"
        assert run(answer(engine, question("say 1", seconds=60)))[-1].text == "I 0 "
        assert engine.status().restarts == restarts + 1
        run(until(lambda: engine.status().is_ready))


@pytest.mark.slow
@needs_ray
def test_stopping_ends_what_runs(run: Run, engine: RayEngine) -> None:
    settings = RaySettings("stopped", slots=1)
    stopped = RayEngine(settings, partial(deploy, obedient, settings))

    async def stop() -> RequestError:
        with pytest.raises(UnavailableError) as early:
            await answer(stopped, question("say 0"))
        assert early.value.code == "loading"
        await stopped.start()
        running = asyncio.create_task(answer(stopped, question("hang")))
        await until(lambda: stopped.status().running == 1)
        await stopped.stop()
        with pytest.raises(UnavailableError) as caught:
            await running
        with pytest.raises(UnavailableError) as late:
            await answer(stopped, question("say 0"))
        assert late.value.code == "draining"
        assert not stopped.status().is_ready
        return caught.value

    assert run(stop()).code == "draining"
    assert run(answer(engine, question("say 0")))[-1].text == "I "  # the other bundle is still served


@pytest.mark.slow
@needs_ray
@pytest.mark.parametrize(
    ("settings", "make_engine", "error", "message"),
    [
        (RaySettings("greedy", cpus=10_000), obedient, UsageError, "10000 processors"),
        (RaySettings("broken"), without_bundle, WorkerError, "no bundle here"),
    ],
)
def test_what_cannot_be_deployed_is_an_error(settings, make_engine, error, message, run, engine):
    with pytest.raises(error, match=message):
        run(RayEngine(settings, partial(deploy, make_engine, settings)).start())
    assert run(answer(engine, question("say 0")))[-1].text == "I "


@pytest.mark.slow
@needs_ray
def test_answers_are_those_of_run_bit_for_bit(run: Run, engine: RayEngine, fp32_bundle: Path) -> None:
    served = open_served_bundle(fp32_bundle)
    loaded = load_bundle(fp32_bundle, served.target)
    settings = RaySettings("golden", slots=2, cpus=1)
    own = Settings(slots=2, threads=1)
    make = partial(embedded, fp32_bundle, "golden", served.target, own)
    ray_engine, here = RayEngine(settings, partial(deploy, make, settings)), EmbeddedEngine(served, 1)
    prompts = [
        loaded.prompt(asked.question, [sample.image])
        for sample in map(make_sample, range(3))
        for asked in sample.questions[:2]
    ]

    async def compare() -> None:
        await ray_engine.start()
        await here.start()

        def asked(prompt: Prompt) -> Question:
            deadline = time.monotonic() + 60
            return Question("id", prompt, (), Sampling(max_tokens=12), deadline, wants_logprob=True)

        remote = await asyncio.gather(*(answer(ray_engine, asked(prompt)) for prompt in prompts))
        for prompt, items in zip(prompts, remote, strict=True):
            local = (await answer(here, asked(prompt)))[-1]
            assert (items[-1].text, items[-1].mean_logprob) == (local.text, local.mean_logprob)
            assert "".join(item.text for item in items[:-1]) == local.text
        assert ray_engine.status().executed_by == loaded.session.executed_by
        await ray_engine.stop()
        await here.stop()

    run(compare())


WHOLE_LIFE = """
import asyncio, functools, json, sys, time
import psutil
from fastvlm_convert.serve.engines.ray import RayEngine
from fastvlm_convert.serve.engines.ray_cluster import RaySettings, deploy
from tests.serve.engines.obedient import obedient
from tests.serve.engines.test_ray import answer, question

async def live():
    settings = RaySettings("alone")
    engine = RayEngine(settings, functools.partial(deploy, obedient, settings))
    began = time.monotonic()
    await engine.start()
    started = time.monotonic() - began
    assert (await answer(engine, question("say 1")))[-1].text == "I 0 "
    processes = psutil.Process().children(recursive=True)
    memory = sum(p.memory_full_info().pss for p in [psutil.Process(), *processes])
    open_ports = {c.laddr.port for p in processes for c in p.net_connections() if c.status == "LISTEN"}
    await engine.stop()
    gone, left = psutil.wait_procs(processes, timeout=20)
    print(json.dumps({"started_s": started, "processes": len(processes), "memory_mb": memory / 1e6,
                      "proxy": 8000 in open_ports, "left": [p.name() for p in left]}))
asyncio.run(live())
"""


@pytest.mark.slow
@needs_ray
def test_ray_is_started_and_ended_with_the_server_and_opens_no_http_port(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WHOLE_LIFE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    print(facts)  # noqa: T201  the figures of docs/serve.md
    assert facts["left"] == []
    assert not facts["proxy"]
    assert (home / ".ray").is_dir()  # where a token is written, and not into the user's


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_extra_is_named():
    settings = RaySettings("bundle")
    with pytest.raises(MissingDependencyError, match="needs ray") as caught:
        asyncio.run(RayEngine(settings, partial(deploy, obedient, settings)).start())
    assert "[ray]" in caught.value.hint
    assert "[all]" not in caught.value.hint


def test_settings_are_given_to_ray_by_its_names():
    options = RaySettings("b", slots=3, cpus=2, min_replicas=1, max_replicas=4, max_queue=9).options()
    assert options["max_ongoing_requests"] == 3
    assert options["max_queued_requests"] == 9
    assert options["ray_actor_options"] == {"num_cpus": 2}
    assert options["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 3,
    }
    fixed = RaySettings("b", min_replicas=2, max_replicas=2).options()
    assert fixed["num_replicas"] == 2
    assert "autoscaling_config" not in fixed


def test_a_queue_that_holds_nothing_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        RaySettings("b", max_queue=0)
