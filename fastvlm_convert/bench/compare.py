"""Did it get slower? Against a bundle measured in the same rounds, or against the stored result of a run.

Only the first can be a paired test. Figures of two runs share no rounds: each is divided, round by round, by
what the same machine needed for unchanged work, and the two distributions are compared. See docs/bench.md for
what that can tell and what not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Final, Literal

import numpy as np

from fastvlm_convert.amounts import count_text
from fastvlm_convert.bench.machine import changes, differences
from fastvlm_convert.bench.result import (
    RUN,
    BenchResult,
    Comparison,
    ContenderResult,
    exponential,
    log_interval,
    median_ratio,
)
from fastvlm_convert.errors import BenchmarkError
from fastvlm_convert.intervals import MINIMUM, Interval

# Rates say the same as the latencies that they are made from, and energy is the whole machine's.
GATED: Final = ("vision_ms", "prefill_ms", "ttft_ms", "decode_ms", "end_to_end_ms", RUN)
REFERENCE: Final = "reference"  # the name of the checkpoint that is run beside bundles

_Basis = Literal["same round", "reference", "calibration loop", "nothing"]


@dataclass(frozen=True)
class _Ratio:
    """New over old.

    Attributes:
        value: The ratio of the medians.
        interval: Where it lies.
        basis: What figures were divided by first.
    """

    value: float
    interval: Interval
    basis: _Basis


def compare_pairs(result: BenchResult, baseline: str, max_regression: float) -> tuple[Comparison, ...]:
    """Compare contenders with those of a baseline that was measured in the same rounds, format by format.

    Args:
        result: The run.
        baseline: Name of the bundle that the others are compared with: `baseline` of `baseline onnx`.
        max_regression: How much slower is allowed, in percent.
    """
    found: list[Comparison] = []
    old = {c.name: c for c in result.contenders if c.name == f"{baseline} {_target(c)}"}
    for contender in result.contenders:
        if contender.name in (REFERENCE, *old) or contender.imported_from is not None:
            continue
        before = old.get(f"{baseline} {_target(contender)}")
        if before is None:
            found.append(_not_run(contender.name, "paired", "the baseline has no bundle of this format"))
            continue

        def ratio(metric: str, new: ContenderResult = contender, was: ContenderResult = before) -> _Ratio:
            value, interval = median_ratio(new.samples[metric], was.samples[metric])
            assert interval is not None  # `require_rounds` has seen to it
            return _Ratio(value, interval, "same round")

        found += _judge(contender, before, "paired", ratio, max_regression)
    return tuple(found)


def compare_runs(result: BenchResult, old: BenchResult, max_regression: float) -> tuple[Comparison, ...]:
    """Compare the contenders of a run with those of the same names in another one.

    Args:
        result: The run.
        old: The other one; see `check_machines`, `check_names` and `check_devices`.
        max_regression: How much slower is allowed, in percent.
    """
    found: list[Comparison] = []
    before = {c.name: c for c in old.contenders}
    for contender in result.contenders:
        was = before.pop(contender.name, None)
        if contender.name == REFERENCE or was is None:
            continue

        def ratio(metric: str, new: ContenderResult = contender, was: ContenderResult = was) -> _Ratio:
            return _unpaired(result, new, old, was, metric)

        found += _judge(contender, was, "unpaired", ratio, max_regression)
    gone = [name for name in before if name != REFERENCE]
    found += [_not_run(name, "unpaired", "the baseline has it, this run does not") for name in gone]
    return tuple(found)


def check_names(names: Sequence[str], old: BenchResult, where: object) -> None:
    """See that a run has something in common with another one.

    Args:
        names: Of the run's contenders.
        old: The other one.
        where: The file it comes from, for messages.

    Raises:
        BenchmarkError: It has not.
    """
    theirs = [c.name for c in old.contenders]
    if not set(names) & set(theirs) - {REFERENCE}:
        what = f"the baseline has {', '.join(theirs)}, and this run {', '.join(names)}: no name in common"
        raise BenchmarkError(what, where=where, hint="a bundle goes by the name of its folder")


def check_devices(result: BenchResult, old: BenchResult, where: object, any_machine: bool) -> tuple[str, ...]:
    """See that imported figures of one name are of one device; what differs and may, in words.

    Raises:
        BenchmarkError: They are not.
    """
    notes = []
    before = {c.name: c for c in old.contenders}
    for contender in result.contenders:
        was = before.get(contender.name)
        if was is None or (contender.imported_from is None and was.imported_from is None):
            continue
        if contender.measured_on != was.measured_on:
            what = f"{contender.name} was measured on {was.measured_on}, now on {contender.measured_on}"
            if not any_machine:
                raise BenchmarkError(what, where=where, hint="--any-machine compares them all the same")
            notes.append(what)
    return tuple(notes)


def check_machines(
    result: BenchResult, old: BenchResult, where: object, any_machine: bool
) -> tuple[str, ...]:
    """See that two runs measured the same work on the same machine; what differs and may, in words.

    Raises:
        BenchmarkError: They did not.
    """
    if result.settings is None or old.settings is None or result.machine is None or old.machine is None:
        return ()  # imported figures say where they come from themselves
    for name, one, other in (
        ("--threads", old.settings.pinning.threads, result.settings.pinning.threads),
        ("--new-tokens", old.settings.new_tokens, result.settings.new_tokens),
        ("the image size", old.settings.image_size, result.settings.image_size),
    ):
        if one != other:
            what = f"the baseline was measured with {name} {one}, this run with {other}"
            raise BenchmarkError(what, where=where, hint="measure both alike")
    notes = [f"since the baseline: {change}" for change in changes(result.machine, old.machine)]
    found = differences(result.machine, old.machine)
    if found and not any_machine:
        raise BenchmarkError(
            f"the baseline is of another machine: {'; '.join(found)}",
            where=where,
            hint="make a baseline here with --save-baseline, or --any-machine compares all the same",
        )
    return (*(f"the baseline is of another machine: {difference}" for difference in found), *notes)


def require_rounds(count: int, what: str, where: object = None) -> None:
    """See that there are enough rounds to compare anything.

    Raises:
        BenchmarkError: There are not.
    """
    if count < MINIMUM:
        raise BenchmarkError(
            f"{what} {count_text(count, 'round')}, and a comparison needs {MINIMUM}",
            where=where,
            hint=f"measure again with --trials {MINIMUM} or more",
        )


def _judge(
    contender: ContenderResult,
    before: ContenderResult,
    kind: Literal["paired", "unpaired"],
    ratio: Callable[[str], _Ratio],
    max_regression: float,
) -> list[Comparison]:
    found = []
    for metric in GATED:
        if (metric in contender.samples) != (metric in before.samples):
            lacks = "this run" if metric in before.samples else "the baseline"
            reason = f"{metric} was not measured in {lacks}"
            found.append(_not_run(contender.name, kind, reason, metric))
        elif metric in contender.samples:
            counts = {"this run": len(contender.samples[metric]), "the baseline": len(before.samples[metric])}
            few = [f"{who} has {count} samples" for who, count in counts.items() if count < MINIMUM]
            if few:
                reason = f"{' and '.join(few)}; {MINIMUM} are needed"
                found.append(_not_run(contender.name, kind, reason, metric))
            else:
                found.append(_comparison(contender.name, metric, kind, ratio(metric), max_regression))
    return found


def _comparison(
    name: str, metric: str, kind: Literal["paired", "unpaired"], ratio: _Ratio, max_regression: float
) -> Comparison:
    is_slower = ratio.interval.low > 1 + max_regression / 100
    low, high = percent(ratio.interval.low), percent(ratio.interval.high)
    message = f"{metric} {percent(ratio.value)} (95 % interval {low} to {high}; {max_regression:g} % allowed)"
    return Comparison(
        contender=name,
        metric=metric,
        kind=kind,
        basis=ratio.basis,
        ratio=ratio.value,
        interval=ratio.interval,
        status="failed" if is_slower else "passed",
        message=message,
    )


def percent(ratio: float) -> str:
    """A ratio as a change: `+12.0 %`."""
    return f"{100 * (ratio - 1):+.1f} %"


def _not_run(
    name: str, kind: Literal["paired", "unpaired"], reason: str, metric: str | None = None
) -> Comparison:
    return Comparison(name, metric, kind, "nothing", None, None, "not_run", reason)


def _unpaired(
    result: BenchResult, new: ContenderResult, old: BenchResult, was: ContenderResult, metric: str
) -> _Ratio:
    """The ratio of two runs, each divided round by round by what unchanged work took in it."""
    basis, ours, theirs = _yardsticks(result, new, old, was, metric)
    one = np.log(np.asarray(new.samples[metric])) - ours
    other = np.log(np.asarray(was.samples[metric])) - theirs
    value = float(np.median(one) - np.median(other))
    here, there = log_interval(one), log_interval(other)
    # The interval of a difference from those of its two independent parts (Zou and Donner, 2008).
    mine, its = float(np.median(one)), float(np.median(other))
    low = value - hypot(mine - here.low, there.high - its)
    high = value + hypot(here.high - mine, its - there.low)
    return _Ratio(float(np.exp(value)), exponential(Interval(low, high, here.level)), basis)


def _yardsticks(
    result: BenchResult, new: ContenderResult, old: BenchResult, was: ContenderResult, metric: str
) -> tuple[_Basis, np.ndarray, np.ndarray]:
    """Logarithms, by round, of what figures of either run are divided by; zeros where there is nothing."""
    nothing: tuple[_Basis, np.ndarray, np.ndarray] = "nothing", np.zeros(1), np.zeros(1)
    if result.settings is None or old.settings is None:
        return nothing
    if new.imported_from is not None or was.imported_from is not None:
        return nothing
    one, other = _reference(result), _reference(old)
    if one is not None and other is not None and _is_same(one, other) and metric in one.samples:
        return "reference", np.log(one.samples[metric]), np.log(other.samples[metric])
    return (
        "calibration loop",
        np.log(result.settings.calibration_ms),
        np.log(old.settings.calibration_ms),
    )


def _reference(result: BenchResult) -> ContenderResult | None:
    return next((c for c in result.contenders if c.name == REFERENCE and c.imported_from is None), None)


def _is_same(one: ContenderResult, other: ContenderResult) -> bool:
    """Whether two references do the same work: another torch would be another yardstick."""
    ours = (one.executed_by, one.file_bytes, one.samples.keys())
    return ours == (other.executed_by, other.file_bytes, other.samples.keys())


def _target(contender: ContenderResult) -> str:
    return contender.name.rpartition(" ")[2]
