"""Make a page from a bundle and from what commands have written about it. No model is run."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastvlm_convert.questions import hard_questions
from fastvlm_convert.report.answers import MAX_SHOWN, by_question
from fastvlm_convert.report.commands import Commands
from fastvlm_convert.report.page import Section, Sources, render, sections_of
from fastvlm_convert.report.pictures import embedded
from fastvlm_convert.report.sources.bench import read_bench
from fastvlm_convert.report.sources.bundle import read_bundle
from fastvlm_convert.report.sources.estimates import read_estimates
from fastvlm_convert.report.sources.evaluation import read_evaluation
from fastvlm_convert.report.sources.lint import read_lint
from fastvlm_convert.report.sources.not_run import NotRun
from fastvlm_convert.report.sources.verification import read_verification
from fastvlm_convert.report.verdict import Verdict, verdict_of


@dataclass(frozen=True)
class Report:
    """A page.

    Attributes:
        html: The file's content.
        verdict: What it says first.
        sections: What is on it, and what is not.
    """

    html: str
    verdict: Verdict
    sections: tuple[Section, ...]


def _generated(images: Path | None) -> dict[str, Image.Image]:
    """The pictures that `verify` generates, by label; none where the user has given others."""
    if images is not None:
        return {}
    asked = [question for question in hard_questions() if question.images]
    return {question.label: question.images[0] for question in asked if question.label is not None}


def make_report(
    bundle: str | Path,
    *,
    evaluation: Path | None = None,
    bench: Path | None = None,
    images: Path | None = None,
) -> Report:
    """The page about a bundle. Its bytes depend on the arguments' content alone.

    Args:
        bundle: Its folder; what `verify --record` wrote into it is on the page.
        evaluation: What `evaluate --json` printed.
        bench: What `bench --json` printed.
        images: Folder of the pictures that `verify` asked about; None shows those that it generates.

    Raises:
        ConversionError: The bundle, its record or a document cannot be read, or matplotlib is missing.
    """
    folder = Path(bundle)
    facts = read_bundle(folder)
    commands = Commands(facts.name)
    verification = read_verification(folder, commands.verify)
    sources = Sources(
        bundle=facts,
        verification=verification,
        evaluation=NotRun("no evaluation was given (--evaluation FILE)", commands.evaluate)
        if evaluation is None
        else read_evaluation(evaluation, folder),
        bench=NotRun("no measurement was given (--bench FILE)", commands.bench)
        if bench is None
        else read_bench(bench),
        estimates=read_estimates(folder, commands.estimate),
        lint=read_lint(folder),
    )
    questions = () if isinstance(verification, NotRun) else by_question(verification.answers)
    labels = (q.picture for q in questions[:MAX_SHOWN] if q.picture is not None)
    verdict, sections = verdict_of(facts, verification), sections_of(sources, questions)
    html = render(sources, verdict, questions, embedded(labels, _generated(images), images), sections)
    return Report(html, verdict, sections)
