"""Linux's counters are files, so a folder stands for a machine that has them."""

import os
import sys
from pathlib import Path

import pytest

from fastvlm_convert.bench.energy import open_meter

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no powercap")


def domain(root: Path, folder: str, name: str, energy: str, wraps_at: str = "1000") -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    return path / "energy_uj"


def test_the_packages_are_added_up_and_nothing_is_counted_twice(tmp_path):
    first = domain(tmp_path, "intel-rapl:0", "package-0", "100")
    second = domain(tmp_path, "intel-rapl:1", "package-1", "990")
    core = domain(tmp_path, "intel-rapl:0:0", "core", "7")  # a part of the first
    again = domain(tmp_path, "intel-rapl-mmio:0", "package-0", "100")  # the first by another way
    platform = domain(tmp_path, "intel-rapl:2", "psys", "5")  # all of it
    meter, reason = open_meter(tmp_path)
    assert reason is None
    before = meter.read()
    first.write_text("400")
    second.write_text("19")  # it began again at 0 after 1000
    for other in (core, again, platform):
        other.write_text("999")
    assert meter.joules(before, meter.read()) == pytest.approx((300 + 30) / 1e6)


def test_a_host_without_counters(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        meter, reason = open_meter(root)
        assert meter is None
        assert reason == f"this host has no counter of energy in {root}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_counters_for_root_alone(tmp_path):
    domain(tmp_path, "intel-rapl:0", "package-0", "1").chmod(0)
    meter, reason = open_meter(tmp_path)
    assert meter is None
    assert "is for root alone" in reason


@pytest.mark.parametrize("content", ["", "many"])
def test_counters_that_make_no_sense(tmp_path, content):
    domain(tmp_path, "intel-rapl:0", "package-0", content)
    meter, reason = open_meter(tmp_path)
    assert meter is None
    assert f"{tmp_path} cannot be read" in reason
