"""Run one target of a bundle in one way, and hold it against the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.errors import (
    BundleError,
    ImageError,
    MissingDependencyError,
    PromptError,
    TokenizerError,
)
from fastvlm_convert.io_names import STAGES, Precision
from fastvlm_convert.predict.export_plan import ExportPlan
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle
from fastvlm_convert.targets import Target
from fastvlm_convert.verification.answers import Candidate
from fastvlm_convert.verification.check import Check, not_run
from fastvlm_convert.verification.compare import Comparison, compare
from fastvlm_convert.verification.context_end import CONTEXT_END, ContextEnd, check_context_end
from fastvlm_convert.verification.execution import Execution
from fastvlm_convert.verification.layers import ReferenceValues
from fastvlm_convert.verification.reference_run import ReferenceRun

Open = Callable[[Path, Target, Precision | None], LoadedModel]

# What a damaged or wrong bundle can raise; the checkpoint's own faults are errors of the command.
_NOT_RUN: Final = (BundleError, ImageError, MissingDependencyError, PromptError, TokenizerError)


@dataclass(frozen=True)
class Standard:
    """What every target of a bundle is held against.

    Attributes:
        plan: What an export of the checkpoint with the bundle's recipe would do.
        runs: What the reference makes of the questions, with the weights that the integers stand for.
        values: What its operations give for the first picture.
        questions: What is asked.
        end: What the reference gives at the end of the context.
    """

    plan: ExportPlan
    runs: Sequence[ReferenceRun]
    values: ReferenceValues
    questions: Sequence[Question]
    end: ContextEnd


@dataclass(frozen=True)
class Run:
    """What came of one run.

    Attributes:
        checks: Of what the files say of themselves; and, if it could not be run, every check that was not.
        comparisons: Stage by stage and end to end, and at the end of the context; none if it was not run.
        loaded: The model; None if it could not be run.
        reason: Why it could not be run, else None.
    """

    checks: tuple[Check, ...]
    comparisons: tuple[Comparison, ...]
    loaded: LoadedModel | None
    reason: str | None

    @property
    def all_checks(self) -> tuple[Check, ...]:
        """Every check there is."""
        return (*self.checks, *(check for found in self.comparisons for check in found.checks))


def run_target(
    bundle: Path,
    target: Target,
    execution: Execution,
    standard: Standard,
    on_progress: OnShare = ignore_share,
    open_target: Open = load_bundle,
) -> Run:
    """Run one target in one way and compare it with the reference.

    Args:
        bundle: The bundle's folder.
        target: One of its targets.
        execution: How to run it, and what it must reach.
        standard: What it is held against.
        on_progress: Called with the share of the questions done, 0..1.
        open_target: Opens it.
    """
    checks: list[Check] = []
    try:
        if execution.inspect is not None:
            checks += execution.inspect(bundle, standard.plan)
        loaded = open_target(bundle, target, execution.precision)
        some = standard.questions[: execution.max_questions]
        runs = standard.runs[: execution.max_questions]
        candidate = Candidate(target, loaded, encoder=execution.encoder)
        compared = compare(candidate, runs, some, execution.gates, on_progress)
        at_end = check_context_end(target, loaded, standard.end, execution.gates)
        if execution.judge is not None:
            checks += execution.judge(bundle, standard.plan, loaded, standard.values)
    except _NOT_RUN as error:
        stages = (*STAGES, CONTEXT_END)
        checks += [not_run(target, stage, _metric(stage), str(error)) for stage in stages]
        return Run(tuple(checks), (), None, str(error))
    return Run(tuple(checks), (compared, at_end), loaded, None)


def _metric(stage: str) -> str:
    return "token_ids" if stage == "greedy_text" else "sqnr_db"
