"""The page's first sentence, and the figures below it."""

from dataclasses import dataclass

from fastvlm_convert.amounts import count_text, size_text
from fastvlm_convert.manifest import Status
from fastvlm_convert.report.answers import Question
from fastvlm_convert.report.sources.bench import Bench
from fastvlm_convert.report.sources.bundle import BundleFacts
from fastvlm_convert.report.sources.not_run import NotRun
from fastvlm_convert.report.sources.verification import Verification
from fastvlm_convert.report.texts import number_text, target_name


@dataclass(frozen=True)
class Verdict:
    """What the page says first.

    Attributes:
        status: Its color.
        sentence: The verdict.
        details: What it rests on, a sentence or two.
    """

    status: Status
    sentence: str
    details: str


@dataclass(frozen=True)
class Tile:
    """One figure at a glance.

    Attributes:
        name: What it is.
        figure: The figure, or `not run`.
        note: What to know with it.
        unit: Of the figure, where it has one.
    """

    name: str
    figure: str
    note: str
    unit: str = ""


def verdict_of(bundle: BundleFacts, verification: Verification | NotRun) -> Verdict:
    """The verdict on a bundle."""
    name = bundle.name
    if isinstance(verification, NotRun):
        details = "Nothing on this page says how closely its answers follow the checkpoint's."
        return Verdict("not_run", f"{name} has not been verified", details)
    total = count_text(len(verification.checks), "check")
    asked = count_text(verification.num_questions, "question")
    counts = {s: sum(c.status == s for c in verification.checks) for s in ("passed", "failed", "not_run")}
    missing = f" {count_text(counts['not_run'], 'check')} could not be run." if counts["not_run"] else ""
    if verification.status == "failed":
        first = next(check for check in verification.checks if check.status == "failed")
        where = f"{first.stage.replace('_', ' ')} ({target_name(first.target)})"
        failed = f"{counts['failed']} of {total} failed on {asked}, the first of them in {where}."
        return Verdict("failed", f"{name} does not answer like its checkpoint", failed + missing)
    if verification.status == "not_run":
        passed = f"{counts['passed']} of {total} passed on {asked}, none failed."
        return Verdict(
            "not_run", f"It is not proven that {name} answers like its checkpoint", passed + missing
        )
    targets = " and ".join(target_name(target) for target in bundle.manifest.targets)
    passed = f"All {total} passed on {asked}, for {targets}."
    return Verdict("passed", f"{name} answers like its checkpoint", passed + _interpreted(verification))


def _interpreted(verification: Verification) -> str:
    """A caveat where nothing but an interpreter has run a target."""
    for verdict in verification.targets:
        if verdict.executed_by and all(by.startswith("interpreter") for by in verdict.executed_by):
            name = target_name(verdict.target)
            return f" {name} was run by an interpreter, which cannot test Apple's kernels."
    return ""


def tiles_of(
    bundle: BundleFacts,
    verification: Verification | NotRun,
    questions: tuple[Question, ...],
    bench: Bench | NotRun,
) -> tuple[Tile, ...]:
    """The figures at a glance."""
    return (*_sizes(bundle), _divergence(verification), *_answers(questions), _first_token(bench))


def _sizes(bundle: BundleFacts) -> list[Tile]:
    bits = bundle.bits_per_weight
    note = "" if bits is None else f"{number_text(bits)} bits a weight"
    tiles = []
    for target, size in bundle.target_bytes.items():
        figure, unit = size_text(size).split(" ")
        tiles.append(Tile(f"Size, {target_name(target)}", figure, note, unit))
    return tiles


def _divergence(verification: Verification | NotRun) -> Tile:
    name = "Mean KL divergence"
    if isinstance(verification, NotRun):
        return Tile(name, "not run", "")
    found = [
        check
        for check in verification.checks
        if check.metric == "kl_mean_nats" and (check.value is not None or check.exact)
    ]
    if not found:
        return Tile(name, "not run", "no answer was compared end to end")
    worst = max(found, key=lambda check: check.value or 0.0)
    what = "what the integers cost" if worst.target == "weights" else target_name(worst.target)
    gate = "" if worst.threshold is None else f"; gate {number_text(worst.threshold)}"
    return Tile(name, number_text(worst.value or 0.0, 2), f"the largest: {what}{gate}", "nats")


def _answers(questions: tuple[Question, ...]) -> list[Tile]:
    if not questions:
        return []
    same = sum(not question.variants for question in questions)
    return [Tile("Answers word for word", f"{same} of {len(questions)}", "the same in every target")]


def _first_token(bench: Bench | NotRun) -> Tile:
    name = "First token"
    others = () if isinstance(bench, NotRun) else tuple(c for c in bench.contenders if not c.is_reference)
    timed = [c for c in others if "ttft_ms" in c.medians]
    if not timed:
        return Tile(name, "not run", "")
    fastest = min(timed, key=lambda c: c.medians["ttft_ms"])
    ratio = fastest.ratios.get("ttft_ms")
    against = "" if ratio is None else f", {ratio:.2f} times the checkpoint's"
    note = f"{fastest.name}{against}; not a phone"
    return Tile(name, number_text(fastest.medians["ttft_ms"]), note, "ms")
