"""What feeds the function of `scaling`, and carries out what it says, with real workers."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_convert.serve.autoscaler import Autoscaler, Scaling
from fastvlm_convert.serve.engines.processes import ProcessesEngine, Workers
from fastvlm_convert.serve.scaling import Limits
from fastvlm_convert.serve.served_bundle import open_served_bundle
from fastvlm_convert.serve.traffic import Passed, Traffic


def test_traffic_is_what_passed_since_the_last_look():
    traffic = Traffic()
    assert traffic.take() == Passed(0, 0, None, None)
    for n in range(1, 101):
        traffic.came()
        traffic.answered(0.010 * n, 0.5)
    traffic.came()
    passed = traffic.take()
    assert (passed.arrivals, passed.answers, passed.service_s) == (101, 100, 0.5)
    assert passed.p95_ms == pytest.approx(1000 * (0.95 + 0.5))
    assert traffic.take() == Passed(0, 0, None, None)


class Load:
    """A load that a test makes up."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.waiting = 0
        self.changes: list[tuple[str, str]] = []

    def scaler(self, engine: ProcessesEngine, interval_s: float = 10.0) -> Autoscaler:
        scaling = Scaling("aggressive", Limits(1, 2), interval_s)
        return Autoscaler(
            engine,
            self.traffic,
            lambda: self.waiting,
            scaling,
            lambda direction, reason: self.changes.append((direction, reason)),
        )

    def is_slow(self) -> None:
        self.traffic.came()
        self.traffic.answered(2.0, 0.5)
        self.waiting = 3

    def is_gone(self) -> None:
        self.waiting = 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


def test_workers_come_with_a_load_and_go_without_it(demo_bundle: Path):
    async def run() -> None:
        engine = ProcessesEngine(open_served_bundle(demo_bundle), Workers(max_workers=2, threads=1))
        await engine.start()
        load = Load()
        scaler = load.scaler(engine)
        load.is_slow()
        decision = await scaler.step()
        assert (decision.direction, decision.reason) == ("up", "latency")
        assert engine.status().workers == {"ready": 2}
        assert engine.status().slots == 2
        measured = scaler.window[-1]
        assert (measured.workers, measured.p95_ms, measured.service_s, measured.queue) == (1, 2500, 0.5, 3)
        load.is_gone()
        scaler.window.clear()  # what was slow with one worker must not keep two
        for _ in range(3):
            await asyncio.sleep(1)
            await scaler.step()
        assert engine.status().workers == {"ready": 1}
        assert load.changes == [("up", "latency"), ("down", "idle")]
        await engine.stop()

    asyncio.run(run())


def test_it_measures_by_itself_until_it_is_stopped(demo_bundle: Path):
    async def run() -> None:
        engine = ProcessesEngine(open_served_bundle(demo_bundle), Workers(max_workers=2, threads=1))
        await engine.start()
        load = Load()
        load.is_slow()
        scaler = load.scaler(engine, 0.1)
        scaler.start()
        await until(lambda: engine.status().workers == {"ready": 2})
        scaler.stop()
        seen = len(scaler.window)
        await asyncio.sleep(0.5)
        assert len(scaler.window) == seen
        await engine.stop()

    asyncio.run(run())
