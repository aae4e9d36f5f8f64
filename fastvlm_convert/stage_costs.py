"""What the stages of a conversion took, as its progress shows it: time and memory."""

import os
import time
from dataclasses import dataclass

from fastvlm_convert.peak_memory import peak_memory_bytes, resident_bytes
from fastvlm_convert.progress import OnStage


@dataclass(frozen=True)
class StageCost:
    """What a stage took.

    Attributes:
        stage: Its name.
        seconds: By the clock.
        cpu_seconds: Of the processors, those of processes that it started and that have ended included.
        peak_memory_bytes: The most memory that was resident. Where an earlier stage had more: the most that
            was seen whenever progress was reported, so that what came and went in between is missing.
    """

    stage: str
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Moment:
    seconds: float
    cpu_seconds: float
    peak: int


class StageMeter:
    """An `OnStage` that notes what every stage takes and passes the progress on.

    What happens between two reports belongs to the stage of the second: a stage reports its end, not always
    its beginning.

    Args:
        on_stage: Called as this is.
    """

    def __init__(self, on_stage: OnStage) -> None:
        self._on_stage = on_stage
        self._costs: dict[str, StageCost] = {}
        self._last = _Moment(time.perf_counter(), _cpu_seconds(), 0)

    def __call__(self, stage: str, share: float) -> None:
        """Note that a stage has come so far."""
        now, before = _Moment(time.perf_counter(), _cpu_seconds(), peak_memory_bytes()), self._last
        # A peak that rose was this stage's. One that did not was another's, as far as the system tells.
        peak = now.peak if now.peak > before.peak else resident_bytes() or now.peak
        known = self._costs.get(stage, StageCost(stage, 0.0, 0.0, 0))
        self._costs[stage] = StageCost(
            stage,
            known.seconds + now.seconds - before.seconds,
            known.cpu_seconds + now.cpu_seconds - before.cpu_seconds,
            max(known.peak_memory_bytes, peak),
        )
        self._last = now
        self._on_stage(stage, share)

    @property
    def costs(self) -> tuple[StageCost, ...]:
        """Of every stage so far, in the order in which they began."""
        return tuple(self._costs.values())


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
