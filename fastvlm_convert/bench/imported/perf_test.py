"""The result file of `onnxruntime_perf_test`.

One line a run: name of the model's folder, seconds, peak working set in bytes, CPU usage in percent, number
of the run (onnxruntime/test/perftest/performance_runner.cc, `PerformanceResult::DumpToFile`). With `-s` an
empty line and statistics follow. The tool appends to a file that is there already.
"""

import math
import re
from typing import Final

from fastvlm_convert.bench.imported.figures import Source, imported
from fastvlm_convert.bench.result import ContenderResult
from fastvlm_convert.errors import BenchmarkError, shown

FORMAT: Final = "onnxruntime_perf_test"
_FIELDS: Final = 5
# "Min Latency: 0.01 s"; releases before 1.14 wrote "Min Latency is 0.01sec".
_STATISTIC: Final = re.compile(r"(Min|Max|P\d+) Latency(?::| is) ([\d.e+-]+) ?s(?:ec)?")


def is_perf_test(text: str) -> bool:
    """Whether a text begins as such a file does."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    fields = line.rsplit(",", _FIELDS - 1)
    return len(fields) == _FIELDS and all(_number(field) is not None for field in fields[1:])


def read_perf_test(source: Source, text: str) -> ContenderResult:
    """The figures in such a file.

    Args:
        source: The file; it must say the device, which the format does not.
        text: Its content.

    Raises:
        BenchmarkError: It is damaged, holds several runs of the tool, or the device is unknown.
    """
    if source.device is None:
        raise BenchmarkError(
            "a file of onnxruntime_perf_test does not say which device it was measured on",
            where=source.path,
            hint="give --measured-on, for example --measured-on 'Pixel 9, Android 15'",
        )
    seconds: list[float] = []
    peak, name = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        statistic = _STATISTIC.fullmatch(line.strip())
        if statistic is not None:
            _check_statistic(source, number, statistic, seconds)
        elif line.strip():
            name, value, peak_bytes = _row(source, number, line, len(seconds))
            seconds.append(value)
            peak = max(peak, peak_bytes)
    return imported(
        source,
        name=source.name_of(name or source.path.stem, f"{source.device} onnx"),
        executed_by="onnxruntime",
        measured_on=source.device,
        imported_from=FORMAT,
        samples={source.metric: tuple(1e3 * value for value in seconds)},
        peak_memory_bytes=peak or None,
    )


def _row(source: Source, number: int, line: str, count: int) -> tuple[str, float, int]:
    """Name, seconds and peak working set of the run that must come next."""
    fields = line.rsplit(",", _FIELDS - 1)
    values = [_number(field) for field in fields[1:]]
    if len(fields) != _FIELDS or any(value is None for value in values):
        what = f"line {number} is {shown(line)}, expected model,seconds,bytes,percent,run"
        raise BenchmarkError(what, where=source.path)
    seconds, peak, _, run = (value for value in values if value is not None)
    if run == 0 and count:
        raise BenchmarkError(
            f"line {number} begins another run of the tool, which appends to its file",
            where=source.path,
            hint="measure again into a new file, or split this one",
        )
    if run != count:
        what = f"line {number} is run {run:g}, expected {count}: lines are missing"
        raise BenchmarkError(what, where=source.path)
    if seconds <= 0:
        what = f"line {number} says that a run took {seconds:g} seconds, expected more than 0"
        raise BenchmarkError(what, where=source.path)
    return fields[0], seconds, int(peak)


def _check_statistic(source: Source, number: int, found: re.Match[str], seconds: list[float]) -> None:
    """The tool's own least and largest time must be those of its lines, else some are missing."""
    ends = {"Min": min, "Max": max}
    if found[1] not in ends or not seconds:
        return
    stated, ours = _number(found[2]), ends[found[1]](seconds)
    if stated is None or not math.isclose(stated, ours, rel_tol=1e-3):
        what = f"line {number} says {found[0]!r}, and the lines before it {ours:g} s"
        raise BenchmarkError(what, where=source.path)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
