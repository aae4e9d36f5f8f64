"""A result of `bench`, for people and for CI systems."""

from collections.abc import Sequence
from typing import Final

from rich.markup import escape
from rich.table import Table

from fastvlm_convert.amounts import size_text
from fastvlm_convert.bench.compare import percent
from fastvlm_convert.bench.result import (
    ENERGY,
    MIN_ROUNDS_P99,
    RATES,
    RUN,
    BenchResult,
    Comparison,
    ContenderResult,
    Settings,
)
from fastvlm_convert.cli.console import err, out, plain_table, status_text
from fastvlm_convert.errors import printable
from fastvlm_convert.intervals import MINIMUM, Interval
from fastvlm_convert.outcomes import Outcome

_LABELS: Final = {
    "vision_ms": "vision ms",
    "prefill_ms": "prefill ms",
    "ttft_ms": "first token ms",
    "decode_ms": "decode ms a token",
    "decode_tokens_per_s": "decode tok/s",
    "end_to_end_ms": "end to end ms",
    RUN: "one run ms",
    ENERGY: "energy J",
}
_BRIEF: Final = {
    "ttft_ms": "first token {} ms",
    "decode_tokens_per_s": "decode {} tok/s",
    RUN: "one run {} ms",
}


def print_result(result: BenchResult) -> None:
    """Print it for people."""
    out.print(_metrics_table(result.contenders))
    out.print()
    out.print(_contenders_table(result.contenders))
    if result.comparisons:
        out.print(f"\n[bold]against {escape(printable(str(result.against)))}[/]", soft_wrap=True)
        out.print(_comparison_table(result.comparisons))
        for comparison in result.comparisons:
            if comparison.status == "not_run":
                reason = escape(printable(f"{comparison.contender}: {comparison.message}"))
                err.print(f"{status_text('not_run')} {reason}", soft_wrap=True)
        out.print(f"\n{status_text(result.status)}: {_findings(result.comparisons)}", soft_wrap=True)
    err.print()
    for line in _explanations(result):
        err.print(escape(printable(line)), soft_wrap=True)


def verdict(result: BenchResult) -> str:
    """One line: `app onnx: first token 69.6 ms (0.75x), decode 136 tok/s (0.92x)`."""
    if result.comparisons:
        return f"{result.status}: {_findings(result.comparisons)}"
    return "; ".join(_brief(contender) for contender in result.contenders)


def outcomes_of(result: BenchResult) -> tuple[Outcome, ...]:
    """Every contender, what was compared, and what could not be measured, for CI systems."""
    found = [Outcome("bench-measured", "info", "passed", _brief(c), c.name) for c in result.contenders]
    for reason in dict.fromkeys(c.energy_not_run for c in result.contenders):
        if reason is not None:
            found.append(Outcome("bench-energy", "info", "not_run", reason))
    for c in result.comparisons:
        found.append(Outcome("bench-regression", "error", c.status, c.message, c.contender))
    return tuple(found)


def _brief(contender: ContenderResult) -> str:
    parts = []
    shown = [m for m in _BRIEF if m in contender.metrics] or list(contender.metrics)
    for metric in shown:
        ratio = contender.ratio_to_reference.get(metric)
        text = _BRIEF.get(metric, _LABELS.get(metric, metric) + " {}")
        factor = "" if ratio is None else f" ({ratio:.2f}x)"
        parts.append(text.format(_figure(contender.metrics[metric].p50)) + factor)
    return printable(f"{contender.name}: {', '.join(parts)}")


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _metrics_table(contenders: Sequence[ContenderResult]) -> Table:
    """A block of rows for each metric, a row for each contender."""
    has_reference = any(c.ratio_to_reference for c in contenders)
    has_p99 = any(spread.p99 is not None for c in contenders for spread in c.metrics.values())
    columns = ["p50", "p90", *(["p99"] if has_p99 else []), "worst", "first answer"]
    columns += ["of the reference"] if has_reference else []
    table = plain_table("", "contender", *columns, right=columns, wrap=("contender",))
    for metric, label in _LABELS.items():
        for number, contender in enumerate(c for c in contenders if metric in c.metrics):
            spread = contender.metrics[metric]
            worst = spread.min if metric in RATES else spread.max
            p99 = [spread.p99] if has_p99 else []
            figures = [spread.p50, spread.p90, *p99, worst, contender.warmup.get(metric)]
            cells = ["-" if figure is None else _figure(figure) for figure in figures]
            if has_reference:
                ratio = contender.ratio_to_reference.get(metric)
                interval = contender.ratio_interval.get(metric)
                cells.append("-" if ratio is None else f"{ratio:.2f}x{_range(interval)}")
            table.add_row("" if number else label, escape(printable(contender.name)), *cells)
    return table


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval.low:.2f} to {interval.high:.2f})"


def _contenders_table(contenders: Sequence[ContenderResult]) -> Table:
    numbers = ("load ms", "peak memory", "files")
    has_imported = any(c.imported_from is not None for c in contenders)
    places = ("measured on",) if has_imported else ()
    texts = ("contender", "executed by", *places)
    table = plain_table("contender", *numbers, "executed by", *places, right=numbers, wrap=texts)
    for c in contenders:
        table.add_row(
            escape(printable(c.name)),
            "-" if c.load_ms is None else f"{c.load_ms:.0f}",
            "-" if c.peak_memory_bytes is None else size_text(c.peak_memory_bytes),
            "-" if c.file_bytes is None else size_text(c.file_bytes),
            escape(printable(c.executed_by)),
            *([escape(printable(c.measured_on))] if has_imported else []),
        )
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    table = plain_table("contender", "metric", "slower by", "95 % interval", "status", right=("slower by",))
    for c in comparisons:
        name, metric = escape(printable(c.contender)), _LABELS.get(c.metric or "", "-")
        if c.ratio is None or c.interval is None:
            table.add_row(name, metric, "-", "-", status_text(c.status))
            continue
        interval = f"{percent(c.interval.low)} to {percent(c.interval.high)}"
        table.add_row(name, metric, percent(c.ratio), interval, status_text(c.status))
    return table


def _findings(comparisons: Sequence[Comparison]) -> str:
    """`2 of 5 figures got slower than allowed, the most: app onnx decode_ms +20 % (...)`."""
    failed = [c for c in comparisons if c.status == "failed"]
    not_run = sum(c.status == "not_run" for c in comparisons)
    rest = f", {not_run} could not be compared" if not_run else ""
    if not failed:
        return f"none of {len(comparisons) - not_run} figures got slower than allowed{rest}"
    most = max(failed, key=lambda c: c.ratio or 0.0)
    text = f"{len(failed)} of {len(comparisons)} figures got slower than allowed{rest}"
    return printable(f"{text}; most of all {most.contender}: {most.message}")


def _explanations(result: BenchResult) -> list[str]:
    lines = []
    if result.settings is not None and result.machine is not None:
        lines.append(_conditions(result.settings, result.machine.title, result.machine.governor))
    lines.append(
        "'first answer' is the one after loading, which counts in no other column. "
        f"Below {MIN_ROUNDS_P99} rounds there is no p99, only the worst."
    )
    if any(c.ratio_to_reference for c in result.contenders):
        text = "'of the reference' is the median of the rounds' ratios"
        few = result.settings is not None and result.settings.trials < MINIMUM
        lines.append(
            f"{text}; its interval takes {MINIMUM} rounds." if few else f"{text}, with its 95 % interval."
        )
    reasons = dict.fromkeys(c.energy_not_run for c in result.contenders if c.imported_from is None)
    lines += [f"energy not run: {reason}" for reason in reasons if reason is not None]
    lines += result.notes
    bases = dict.fromkeys(c.basis for c in result.comparisons if c.ratio is not None)
    lines += [_BASES[basis] for basis in bases]
    return lines


_BASES: Final = {
    "same round": "Compared in pairs: both were measured in the same rounds.",
    "reference": "Compared across runs: every figure divided by the reference's of its round.",
    "calibration loop": "Compared across runs: every figure divided by a fixed piece of work in its round.",
    "nothing": "Compared across runs as they are: nothing says how fast the devices were.",
}


def _conditions(settings: Settings, machine: str, governor: str | None) -> str:
    cpus = settings.pinning.cpus
    where = "not bound" if cpus is None else f"bound to CPU {', '.join(map(str, cpus))}"
    trials = "" if settings.trials == 1 else "s"
    plural = "" if settings.pinning.threads == 1 else "s"
    return (
        f"{settings.trials} trial{trials} of {settings.new_tokens} tokens on this host, not a phone "
        f"({machine}); {settings.pinning.threads} thread{plural} each, {where}; "
        f"governor {governor or 'unknown'}."
    )
