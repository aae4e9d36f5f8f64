"""`fastvlm-convert lint`: rules about a bundle, from public reports."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.amounts import count_text
from fastvlm_convert.cli.console import err, out, plain_table, report, status_text
from fastvlm_convert.cli.document import EXIT_CODES, Document
from fastvlm_convert.cli.output_format import OutputFormat, OutputFormatOption, report_outcomes
from fastvlm_convert.errors import UsageError, printable
from fastvlm_convert.lint.platform import COMPUTE_UNITS, PROVIDERS, Platform, Version, known, version_of
from fastvlm_convert.lint.rule import Rule
from fastvlm_convert.lint.run import LintResult, lint
from fastvlm_convert.lint.table import RULES, rule_named
from fastvlm_convert.manifest import Status
from fastvlm_convert.outcomes import Outcome, Severity

EXAMPLES = """
fastvlm-convert lint app --ios 26 --compute-units cpuAndGPU
fastvlm-convert lint --explain onnx-float16-matmulnbits
"""
_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_SINGULARS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}


@dataclass(frozen=True)
class LintDocument(Document, name="lint", statuses=("passed", "failed", "not_run")):
    """What was found about a bundle.

    Attributes:
        bundle: The bundle's folder.
        platform: Where it is going to run, as the options say; null is what they leave open.
        strict: Whether a warning fails, too.
        outcomes: One for each place that breaks a rule, and one for each rule that nothing breaks.
        not_applicable: Rules about other targets or platforms.
    """

    bundle: str
    platform: Platform
    strict: bool
    outcomes: tuple[Outcome, ...]
    not_applicable: tuple[str, ...]


@dataclass(frozen=True)
class RuleDocument(Document, name="lint-rule"):
    """A rule, explained.

    Attributes:
        id: Its name.
        severity: What it means where the rule applies for certain.
        targets: Formats that it is about; none if it is about the bundle as a whole.
        scope: Where it applies.
        reason: Why.
        source: Public report or document that says so.
        advice: What to do.
    """

    id: str
    severity: str
    targets: tuple[str, ...]
    scope: str
    reason: str
    source: str
    advice: str


def _rule_ids(incomplete: str) -> list[str]:
    return [name for name in RULES if name.startswith(incomplete)]


IosOption = Annotated[
    str | None, typer.Option("--ios", metavar="VERSION", help="iOS it runs on.", show_default=False)
]
AndroidOption = Annotated[
    str | None, typer.Option("--android", metavar="VERSION", help="Android it runs on.", show_default=False)
]
OnnxRuntimeOption = Annotated[
    str | None,
    typer.Option(
        "--onnxruntime", metavar="VERSION", help="ONNX Runtime that the app links.", show_default=False
    ),
]
ProviderOption = Annotated[
    str | None,
    typer.Option(
        "--execution-provider",
        metavar="|".join(PROVIDERS),
        help="What ONNX Runtime runs it with; cpu if omitted.",
        autocompletion=lambda incomplete: [name for name in PROVIDERS if name.startswith(incomplete)],
        show_default=False,
    ),
]
ComputeUnitsOption = Annotated[
    str | None,
    typer.Option(
        "--compute-units",
        metavar="|".join(COMPUTE_UNITS),
        help="What Core ML runs it with.",
        autocompletion=lambda incomplete: [units for units in COMPUTE_UNITS if units.startswith(incomplete)],
        show_default=False,
    ),
]


def command(
    context: typer.Context,
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Folder of a bundle.", show_default=False)
    ] = None,
    ios: IosOption = None,
    android: AndroidOption = None,
    onnxruntime: OnnxRuntimeOption = None,
    execution_provider: ProviderOption = None,
    compute_units: ComputeUnitsOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail for a warning, too.")] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="ID",
            help="Explain a rule instead of checking a bundle.",
            autocompletion=_rule_ids,
            show_default=False,
        ),
    ] = None,
    output_format: OutputFormatOption = None,
) -> None:
    """Check a bundle against what is publicly known of its platform.

    Each rule names the report it comes from. What you do not say about the platform makes errors of rules
    about it warnings. The exit code is 1 if there is an error, and 2 if a rule could not be checked.
    """
    if explain is not None and bundle is None:
        _explain(context, rule_named(explain), output_format)
        return
    if explain is not None or bundle is None:
        raise UsageError("lint takes either a BUNDLE or --explain ID", hint="give one of the two")
    platform = Platform(
        ios=_version(ios, "--ios"),
        android=_version(android, "--android"),
        onnxruntime=_version(onnxruntime, "--onnxruntime"),
        provider=known(execution_provider, PROVIDERS, "--execution-provider"),
        compute_units=known(compute_units, COMPUTE_UNITS, "--compute-units"),
    )
    result = lint(bundle, platform)
    status = result.status(strict)
    verdict = _verdict(result, status)
    document = LintDocument(str(bundle), platform, strict, result.outcomes, result.not_applicable)
    report_outcomes(
        context,
        output_format,
        [_strictly(outcome) for outcome in result.outcomes] if strict else result.outcomes,
        status,
        document,
        lambda: _print(result, status, verdict),
        brief=verdict,
    )
    raise typer.Exit(EXIT_CODES[status])


def _version(text: str | None, option: str) -> Version | None:
    return None if text is None else version_of(text, option)


def _strictly(outcome: Outcome) -> Outcome:
    """The same where a warning is an error."""
    return dataclasses.replace(outcome, severity="error") if outcome.severity == "warning" else outcome


def _verdict(result: LintResult, status: Status) -> str:
    counts = Counter(outcome.severity for outcome in result.findings)
    found = ", ".join(count_text(counts[kind], _SINGULARS[kind]) for kind in _SINGULARS)
    rules = len({outcome.id for outcome in result.outcomes})
    return f"{status}: {found}; {rules} rules apply, {len(result.not_applicable)} do not"


def _print(result: LintResult, status: Status, verdict: str) -> None:
    if result.findings:
        table = plain_table("", "rule", "where", "what", wrap=("where", "what"))
        for finding in result.findings:
            severity = f"[{_STYLES[finding.severity]}]{_SINGULARS[finding.severity]}[/]"
            where = escape(printable(finding.where or "bundle"))
            table.add_row(severity, finding.id, where, escape(printable(finding.message)))
        out.print(table)
        out.print()
    for outcome in result.outcomes:
        if outcome.status == "not_run":
            err.print(f"{outcome.id} not run: {escape(printable(outcome.message))}", soft_wrap=True)
    out.print(verdict.replace(status, status_text(status), 1), soft_wrap=True)
    if result.findings:
        err.print("\nwhy, and what to do: fastvlm-convert lint --explain RULE", soft_wrap=True)


def _explain(context: typer.Context, rule: Rule, output_format: OutputFormat | None) -> None:
    """Print a rule.

    Raises:
        UsageError: In a format that has no place for it.
    """
    if output_format in (OutputFormat.GITHUB, OutputFormat.JUNIT):
        raise UsageError(f"--explain has no {output_format} form", hint="leave --output-format out")
    facts = {f.name: getattr(rule, f.name) for f in dataclasses.fields(RuleDocument)}
    document = RuleDocument(**facts)

    def show() -> None:
        for name, value in facts.items():
            text = ", ".join(value) or "any" if name == "targets" else str(value)
            out.print(f"[bold]{name:<10}[/]{escape(text)}", soft_wrap=True)

    report(context, "passed", document, show)
