"""What stages take, told apart by the progress that they report."""

import time

import pytest

from fastvlm_convert.peak_memory import peak_memory_bytes, resident_bytes
from fastvlm_convert.stage_costs import StageMeter

MB = 1 << 20


def costs_of(meter: StageMeter) -> dict[str, tuple[float, float, int]]:
    return {c.stage: (c.seconds, c.cpu_seconds, c.peak_memory_bytes) for c in meter.costs}


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_time_belongs_to_the_stage_that_reports_next():
    seen: list[tuple[str, float]] = []
    meter = StageMeter(lambda stage, share: seen.append((stage, share)))
    busy(0.2)
    meter("read", 0.5)
    time.sleep(0.3)
    meter("read", 1.0)
    meter("write", 0.0)
    busy(0.1)
    meter("write", 1.0)
    meter("read", 1.0)
    found = costs_of(meter)
    assert list(found) == ["read", "write"]
    assert found["read"][1] == pytest.approx(0.2, abs=0.06)
    assert found["write"][1] == pytest.approx(0.1, abs=0.06)
    assert found["read"][0] >= 0.5
    assert found["read"][0] - found["read"][1] >= 0.28  # asleep
    assert seen == [("read", 0.5), ("read", 1.0), ("write", 0.0), ("write", 1.0), ("read", 1.0)]


@pytest.mark.skipif(resident_bytes() is None, reason="the system tells only the peak")
def test_memory_that_was_given_back_is_the_earlier_stages():
    meter = StageMeter(lambda stage, share: None)
    meter("before", 1.0)
    block = bytearray(peak_memory_bytes() - (resident_bytes() or 0) + 300 * MB)
    del block
    meter("large", 1.0)
    small = bytearray(50 * MB)
    meter("small", 1.0)
    assert len(small) == 50 * MB
    before, large, small_peak = (peak for _, _, peak in costs_of(meter).values())
    assert large - before >= 290 * MB
    assert large == peak_memory_bytes()
    assert large - small_peak >= 200 * MB


def test_nothing_has_run():
    assert StageMeter(lambda stage, share: None).costs == ()
