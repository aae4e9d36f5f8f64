"""What `verify` tells a person: the verdict first, the tables on request."""

from collections.abc import Sequence
from typing import Final

from rich.markup import escape
from rich.table import Table

from fastvlm_convert.amounts import count_text
from fastvlm_convert.cli.console import err, out, plain_table, print_warnings, status_text
from fastvlm_convert.intervals import Interval
from fastvlm_convert.verification.answers import AnswerFigures
from fastvlm_convert.verification.bundle import VerifyResult
from fastvlm_convert.verification.check import Check, status_of
from fastvlm_convert.verification.diagnosis import Diagnosis, nearest, share_used

_METRICS: Final = {
    "sqnr_db": "SQNR dB",
    "psnr_db": "PSNR dB",
    "max_abs_error": "max abs",
    "cosine_similarity": "cosine",
    "kl_mean_nats": "KL mean",
    "kl_median_nats": "median",
    "kl_p99_nats": "KL p99",
    "kl_max_nats": "max",
    "top1_agreement": "top-1",
    "flips": "flips",
    "identical_share": "same text",
}
_WIDEST_TARGET: Final = 8


def verdict_of(result: VerifyResult, num_pictures: int) -> str:
    """One line: the status, and on how much it stands."""
    if result.num_questions == num_pictures:
        return f"{result.status} on {count_text(num_pictures, 'image')}"
    questions = count_text(result.num_questions, "question")
    return f"{result.status} on {questions} about {count_text(num_pictures, 'image')}"


def print_result(result: VerifyResult, warnings: tuple[str, ...], verdict: str, *, details: bool) -> None:
    """Print the verdict, a line a target, the stage nearest to its gate, and likely causes; tables last."""
    print_warnings(warnings)
    out.print(verdict.replace(result.status, status_text(result.status), 1), soft_wrap=True)
    figures = {shown.target: shown for shown in _shown(result.figures)}
    for target in dict.fromkeys(check.target for check in result.checks):
        checks = [check for check in result.checks if check.target == target]
        _print_target(target, checks, figures.get(target))
    for reason in dict.fromkeys(f.no_interval for f in figures.values() if f.no_interval):
        out.print(reason, soft_wrap=True)
    if (closest := nearest(result.checks)) is not None:
        side = "farthest beyond its gate" if closest.status == "failed" else "nearest to its gate"
        out.print(f"{side}: {_gate_text(closest)}", soft_wrap=True)
    for diagnosis in result.diagnoses:
        _print_diagnosis(diagnosis, result)
    if details:
        _print_details(result)
    for line in dict.fromkeys(_reason(check) for check in result.checks if check.reason):
        err.print(line, soft_wrap=True)
    if any((check.executed_by or "").startswith("interpreter") for check in result.checks):
        err.print(
            "The interpreter runs the package's program on its weights; it cannot test Apple's own kernels.",
            soft_wrap=True,
        )


def _shown(figures: Sequence[AnswerFigures]) -> list[AnswerFigures]:
    """Of each target the execution that departs most: the exact ones say nothing of a device."""
    found: dict[str, AnswerFigures] = {}
    for one in figures:
        if one.target not in found or _departure(one) > _departure(found[one.target]):
            found[one.target] = one
    return list(found.values())


def _departure(figures: AnswerFigures) -> tuple[bool, float, float]:
    """Infinite divergence counts most."""
    mean = figures.kl_mean_nats
    return mean is None, 0.0 if mean is None else mean, figures.flips


def _print_target(target: str, checks: Sequence[Check], figures: AnswerFigures | None) -> None:
    status = status_of(checks)
    failed = sum(check.status == "failed" for check in checks)
    skipped = sum(check.status == "not_run" for check in checks)
    parts = [f"{failed} of {len(checks)} checks failed" if failed else f"{len(checks)} checks"]
    if skipped:
        parts.append(f"{skipped} not run")
    if figures is not None:
        parts += _figure_texts(figures)
    padding = " " * (len("not_run") - len(status) + 2)
    line = f"{status_text(status)}{padding}{target:<{_WIDEST_TARGET}} {escape('; '.join(parts))}"
    out.print(line, soft_wrap=True)


def _figure_texts(figures: AnswerFigures) -> list[str]:
    changed = round(figures.flips * figures.num_answers)
    return [
        f"{changed} of {figures.num_answers} answers differ{_interval(figures, 'flips')}",
        f"KL {_nats(figures.kl_mean_nats)} nats a token{_interval(figures, 'kl_mean_nats')}",
        f"same likeliest token {figures.top1_agreement:.1%}{_interval(figures, 'top1_agreement')}",
    ]


def _interval(figures: AnswerFigures, name: str) -> str:
    found = figures.intervals.get(name)
    return "" if found is None else f" ({_interval_text(found, name)})"


def _interval_text(found: Interval, name: str) -> str:
    if name.endswith("_nats"):
        return f"{found.low:.2g} to {found.high:.2g}"
    return f"{found.low:.1%} to {found.high:.1%}"


def _nats(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _gate_text(check: Check) -> str:
    value, gate, used = check.value, check.threshold, share_used(check)
    assert value is not None
    assert gate is not None
    assert used is not None
    side = "at most" if _is_limit(check) else "at least"
    by = f", {check.executed_by}" if check.executed_by else ""
    figure = f"{check.metric} {_value_text(check.metric, value)}, {side} {gate:g}"
    share = f"{used:.0%} of" if used <= 1 else f"{used:.1f} times"
    return escape(f"{check.target} {check.stage}: {figure} ({share} the error it allows{by})")


def _print_diagnosis(found: Diagnosis, result: VerifyResult) -> None:
    out.print(f"[bold]{found.target}[/] first breaks at {found.stage} ({found.metric})", soft_wrap=True)
    parted = result.first_divergence.get(found.target)
    if parted is not None:
        out.print(escape(f"  first operation that parts: {parted.layer}, {parted.reason}"), soft_wrap=True)
    name = "" if found.cause is None else f"{found.cause}: "
    out.print(escape(f"  likely cause: {name}{found.text}"), soft_wrap=True)


def _reason(check: Check) -> str:
    by = f" ({check.executed_by})" if check.executed_by else ""
    return f"{status_text(check.status)} {check.target} {check.stage}{by}: {escape(check.reason or '')}"


def _print_details(result: VerifyResult) -> None:
    out.print()
    out.print(_check_table(result))
    _print_measurements(result)
    _print_intervals(result.figures)


def _check_table(result: VerifyResult) -> Table:
    numbers = ("value", "gate")
    table = plain_table("target", "stage", "metric", *numbers, "status", "executed by", right=numbers)
    for check in result.checks:
        exact = "-" if check.status == "not_run" else "equal"
        sign = "<=" if _is_limit(check) else ">="
        gate = exact if check.threshold is None else f"{sign} {check.threshold:g}"
        text = "-" if check.value is None else _value_text(check.metric, check.value)
        value, by = "equal" if check.exact else text, check.executed_by or ""
        table.add_row(check.target, check.stage, check.metric, value, gate, status_text(check.status), by)
    return table


def _is_limit(check: Check) -> bool:
    return check.metric.endswith(("_nats", "max_abs"))


def _value_text(metric: str, value: float) -> str:
    return f"{value:.1f}" if metric.endswith("_db") else f"{value:.3g}"


def _print_measurements(result: VerifyResult) -> None:
    """A table for each target and what executed it: one for all is too wide for a terminal."""
    groups: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for m in result.measurements:
        shown = f"{m.value:.3g}" if m.value is not None else "equal" if m.exact else "not finite"
        stages = groups.setdefault((m.target, m.executed_by or ""), {})
        stages.setdefault(m.stage, {})[_METRICS.get(m.metric, m.metric)] = shown
    for (target, by), stages in groups.items():
        used = [name for name in _METRICS.values() if any(name in row for row in stages.values())]
        table = plain_table("stage", *used, right=used)
        for stage, row in stages.items():
            table.add_row(stage, *(row.get(name, "") for name in used))
        out.print(f"\n[bold]{target}[/]{f', executed by {escape(by)}' if by else ''}", soft_wrap=True)
        out.print(table)


def _print_intervals(figures: Sequence[AnswerFigures]) -> None:
    """The answers in figures, with intervals over pictures where there are enough of them."""
    names = [name for f in figures for name in f.intervals]
    if not names:
        return
    used = list(dict.fromkeys(names))
    table = plain_table("target", "executed by", *(_METRICS[name] for name in used))
    for f in figures:
        if f.intervals:
            row = (_interval_text(f.intervals[n], n) if n in f.intervals else "-" for n in used)
            table.add_row(f.target, escape(f.executed_by), *row)
    level = next(i.level for f in figures for i in f.intervals.values())
    out.print(f"\n[bold]{level:.0%} intervals over pictures[/]", soft_wrap=True)
    out.print(table)
