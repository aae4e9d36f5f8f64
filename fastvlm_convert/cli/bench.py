"""`fastvlm-convert bench`: latency and memory, side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import typer

from fastvlm_convert.bench.baseline import check_writable, save_result
from fastvlm_convert.bench.imported.figures import Source
from fastvlm_convert.bench.imported.files import parse_source
from fastvlm_convert.bench.request import DEFAULT_REGRESSION, Request, run_bench
from fastvlm_convert.bench.result import BenchResult
from fastvlm_convert.cli.bench_options import (
    AgainstOption,
    AnyMachineOption,
    BundlesArgument,
    ImportOption,
    MaxRegressionOption,
    MeasuredOnOption,
    NewTokensOption,
    ReferenceOption,
    SaveBaselineOption,
    ThreadsOption,
    TrialsOption,
)
from fastvlm_convert.cli.bench_text import outcomes_of, print_result, verdict
from fastvlm_convert.cli.console import progress
from fastvlm_convert.cli.document import EXIT_CODES, Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.output_format import OutputFormatOption, report_outcomes
from fastvlm_convert.errors import UsageError
from fastvlm_convert.intervals import MINIMUM

EXAMPLES = """
fastvlm-convert bench app --reference FastVLM-0.5B
fastvlm-convert bench new --against old --max-regression 5
"""


@dataclass(frozen=True)
class BenchDocument(BenchResult, Document, name="bench", statuses=("passed", "failed", "not_run")):
    """Latency and memory, and what came of a comparison; `--against` reads it too."""


def command(
    context: typer.Context,
    bundles: BundlesArgument = None,
    reference: ReferenceOption = None,
    new_tokens: NewTokensOption = 32,
    trials: TrialsOption = MINIMUM,
    threads: ThreadsOption = None,
    imports: ImportOption = None,
    measured_on: MeasuredOnOption = None,
    save_baseline: SaveBaselineOption = None,
    against: AgainstOption = None,
    max_regression: MaxRegressionOption = None,
    any_machine: AnyMachineOption = False,
    output_format: OutputFormatOption = None,
) -> None:
    """Measure latency and memory, side by side or with a baseline.

    Bundles and reference take turns, each in a process of its own, so that whatever else the machine does
    affects all alike. With --against the exit code is 1 if something got slower than allowed, and 2 if that
    cannot be told.
    """
    given = tuple(bundles or ())
    sources = [parse_source(text, measured_on) for text in imports or ()]
    _check_usage(given, sources, reference=reference, against=against, save=save_baseline)
    if against is None and (max_regression is not None or any_machine):
        flag = "--any-machine" if any_machine else "--max-regression"
        raise UsageError(f"{flag} needs --against", hint="give --against BUNDLE or --against FILE")
    if max_regression is not None and math.isinf(max_regression):
        raise UsageError("--max-regression inf would let everything pass", hint="give percent, such as 5")
    if measured_on is not None and not sources:
        raise UsageError("--measured-on needs --import", hint="give --import FILE")
    if save_baseline is not None:
        check_writable(save_baseline)
    request = Request(given, reference, new_tokens, trials, threads)
    with progress(flags_of(context).is_silent) as on_stage:
        result = run_bench(
            request,
            sources,
            against,
            max_regression=DEFAULT_REGRESSION if max_regression is None else max_regression,
            any_machine=any_machine,
            on_progress=partial(on_stage, "bench"),
        )
    if save_baseline is not None:
        save_result(save_baseline, result)
    report_outcomes(
        context,
        output_format,
        outcomes_of(result),
        result.status,
        BenchDocument(**{field.name: getattr(result, field.name) for field in fields(result)}),
        lambda: print_result(result),
        brief=verdict(result),
    )
    raise typer.Exit(EXIT_CODES[result.status])


def _check_usage(
    bundles: Sequence[Path],
    sources: Sequence[Source],
    *,
    reference: Path | None,
    against: Path | None,
    save: Path | None,
) -> None:
    """See that the arguments make sense together.

    Raises:
        UsageError: They do not.
    """
    if not bundles and not sources:
        raise UsageError("Missing argument 'BUNDLE...'", hint="give bundles to measure, or --import FILE")
    for path in bundles:
        if sources and path.is_file():
            what = f"'{path}' is a file, and bundles are folders"
            raise UsageError(what, hint=f"each file to import has its own flag: --import {path}")
    if not bundles and reference is not None:
        raise UsageError("--reference needs a bundle to measure beside it", hint="give BUNDLE")
    if not bundles and against is not None and against.is_dir():
        what = "--against a bundle measures it beside others, and there are none"
        raise UsageError(what, hint="give BUNDLE, or the FILE of a saved result")
    if save is not None and against is not None and save.resolve() == against.resolve():
        what = "--save-baseline would replace the baseline that --against compares with"
        raise UsageError(what, hint="save it under another name")
