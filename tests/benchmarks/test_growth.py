"""What the measurement of growth fits, draws and counts."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.growth import SHAPES, STAGES, Row, count_parameters, fit, fits, main, plot, table
from benchmarks.growth_plot import round_up
from benchmarks.measured_process import run_measured

GIB = 2**30


def rows(seconds, peaks, stage="quantize"):
    sizes = (250_000_000, 620_000_000, 1_670_000_000)
    return [
        Row(f"{size}", size, stage, s, int(p * GIB)) for size, s, p in zip(sizes, seconds, peaks, strict=True)
    ]


def test_a_line_is_found_again():
    found = fit(np.array([1e9, 2e9, 4e9]), np.array([15.0, 25.0, 45.0]))
    assert (found.base, found.per_billion, found.worst) == pytest.approx((5, 10, 0), abs=1e-9)


def test_what_is_no_line_is_told_by_its_distance():
    found = fit(np.array([1e9, 2e9, 4e9]), np.array([1.0, 4.0, 16.0]))
    assert found.worst > 0.3


def test_flat_memory_and_linear_time_read_so():
    assert "| quantize | 0.0 +40.0 per billion | 0 % | 0.30 +0.00 per billion | 0 % |" in fits(
        rows((10.0, 24.8, 66.8), (0.3, 0.3, 0.3))
    )


def test_two_sizes_prove_no_line():
    assert "| quantize | 3.2 +27.0 per billion | - |" in fits(rows((10.0, 20.0, 99.0), (1, 1, 1))[:2])


def test_a_single_size_gets_no_line():
    assert "quantize" not in fits(rows((1.0, 2.0, 3.0), (1, 1, 1))[:1])


def test_what_was_not_run_says_why():
    absent = Row("1.5b", 1_670_000_000, "verify onnx", None, None, "the reference takes 6.2 GiB")
    assert "not_run: the reference takes 6.2 GiB" in table([absent])
    assert "verify" not in fits([absent])


@pytest.mark.parametrize(
    ("shape", "billions"), [("0.1b", 0.24), ("0.5b", 0.62), ("1.5b", 1.68), ("7b-2-layers", 1.7)]
)
def test_shapes_are_as_large_as_they_are_called(shape, billions):
    assert count_parameters(SHAPES[shape]()) / 1e9 == pytest.approx(billions, rel=0.05)


def test_an_unknown_shape_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["growth", "3b"])
    with pytest.raises(SystemExit):
        main()
    assert "there are 0.1b, 0.5b" in capsys.readouterr().err


def test_every_figure_is_a_point_of_the_drawing(tmp_path):
    figures = [row for stage in STAGES for row in rows((10.0, 24.8, 66.8), (0.3, 0.3, 0.4), stage)]
    plot(figures, tmp_path / "growth.svg")
    root = ElementTree.parse(tmp_path / "growth.svg").getroot()
    circles = [e for e in root.iter("{http://www.w3.org/2000/svg}circle") if e.get("r") == "3.5"]
    assert len(circles) == 2 * len(figures)
    across = [float(c.get("cx")) for c in circles[:3]]
    assert (across[2] - across[0]) / (across[1] - across[0]) == pytest.approx(1.42 / 0.37, rel=0.01)
    plot(figures, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "growth.svg").read_bytes()


@pytest.mark.parametrize(("value", "rounded"), [(0.3, 0.5), (1.0, 1), (1.68, 2), (24.8, 50), (66.8, 100)])
def test_axes_end_at_round_figures(value, rounded):
    assert round_up(value) == pytest.approx(rounded)


def test_a_process_is_charged_for_what_it_and_its_children_took():
    work = "import subprocess, sys; x = bytearray(200 << 20); subprocess.run([sys.executable, '-c', {!r}])"
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    cost, printed = run_measured([sys.executable, "-c", work.format(spin) + "; print('done')"])
    assert printed.split() == ["done"]
    assert cost.cpu_s > 0.3
    assert 200 << 20 < cost.peak_bytes < 400 << 20


def test_a_process_that_fails_stops_the_measurement_unless_its_code_is_allowed():
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    with pytest.raises(SystemExit, match="ended with 1"):
        run_measured(command)
    assert run_measured(command, allowed=(0, 1))[1] == ""
