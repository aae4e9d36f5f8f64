"""Measures a bundle's load, asks `scaling.decide`, and does what it says."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil

from fastvlm_convert.errors import ConversionError
from fastvlm_convert.processors import usable_cpus
from fastvlm_convert.serve.answers import AnswerPath
from fastvlm_convert.serve.engines.processes import ProcessesEngine
from fastvlm_convert.serve.engines.worker_memory import available_bytes
from fastvlm_convert.serve.metrics import Metrics
from fastvlm_convert.serve.scaling import Decision, Limits, Measurement, Resources, Strategy, decide
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.serve.traffic import Traffic

_LOG: Final = logging.getLogger(__name__)
INTERVAL_S: Final = 10.0
_WINDOW: Final = 60  # measurements: ten minutes


@dataclass(frozen=True)
class Scaling:
    """How the number of workers follows the load.

    Attributes:
        strategy: `FAST_VLM_SCALING_STRATEGY`.
        limits: Fewest and most workers.
        interval_s: Seconds between two measurements.
    """

    strategy: Strategy
    limits: Limits
    interval_s: float = INTERVAL_S


class Autoscaler:
    """Keeps the number of workers of an engine in line with its load.

    Args:
        engine: Whose workers they are.
        traffic: What passes.
        waiting: How many questions wait now.
        scaling: How the number follows the load.
        on_change: Called with direction and reason of each change.
    """

    def __init__(
        self,
        engine: ProcessesEngine,
        traffic: Traffic,
        waiting: Callable[[], int],
        scaling: Scaling,
        on_change: Callable[[str, str], object],
    ) -> None:
        self.window: deque[Measurement] = deque(maxlen=_WINDOW)
        self._engine = engine
        self._traffic = traffic
        self._waiting = waiting
        self._scaling = scaling
        self._on_change = on_change
        self._cores = len(usable_cpus())
        self._at_s = time.monotonic()
        self._cpu_s = self._processor_time_s()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Measure and decide from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """No more decisions."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._scaling.interval_s)
            await self.step()

    async def step(self) -> Decision:
        """Measure, decide, and do it; a worker that is too many finishes its question first."""
        self.window.append(self._measure())
        decision = decide(self._scaling.strategy, list(self.window), self._resources(), self._scaling.limits)
        if decision.direction != "none":
            _LOG.info("workers: %d -> %d (%s)", self._engine.num_workers, decision.workers, decision.reason)
            try:
                await self._engine.scale_to(decision.workers)
            except ConversionError as error:
                _LOG.error("a worker more does not start: %s", error)
            else:
                self._on_change(decision.direction, decision.reason)
        return decision

    def _measure(self) -> Measurement:
        now, cpu_s, passed = time.monotonic(), self._processor_time_s(), self._traffic.take()
        seconds = max(now - self._at_s, 1e-9)
        used_s = max(0.0, cpu_s - self._cpu_s)  # less than before where a worker has ended
        self._at_s, self._cpu_s = now, cpu_s
        return Measurement(
            at_s=now,
            workers=self._engine.num_workers,
            p95_ms=passed.p95_ms,
            cpu_percent=100 * used_s / seconds / self._cores,
            arrivals_per_s=passed.arrivals / seconds,
            answers_per_s=passed.answers / seconds,
            service_s=passed.service_s,
            queue=self._waiting(),
        )

    def _processor_time_s(self) -> float:
        own = psutil.Process().cpu_times()
        return float(own.user + own.system) + self._engine.cpu_s

    def _resources(self) -> Resources:
        workers, each = self._engine.num_workers, self._engine.cores_per_worker
        return Resources(
            workers=workers,
            free_cores=max(0, self._cores - workers * each),
            cores_per_worker=each,
            free_bytes=available_bytes(),
            bytes_per_worker=self._engine.worker_bytes,
        )


def autoscaler(path: AnswerPath, settings: Settings, metrics: Metrics) -> Autoscaler | None:
    """What scales a bundle; None where the number of its workers is fixed, or is not ours."""
    engine = path.engine
    if not isinstance(engine, ProcessesEngine) or settings.min_workers == settings.max_workers:
        return None
    scaling = Scaling(settings.scaling_strategy, Limits(settings.min_workers, settings.max_workers))
    admission = path.admission
    return Autoscaler(engine, path.traffic, lambda: admission.waiting, scaling, metrics.scaling_decision)
