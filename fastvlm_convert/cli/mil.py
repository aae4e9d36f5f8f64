"""`fastvlm-convert mil`: what is in a Core ML package, and where its time goes; runs on any machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.cli.console import out, plain_table, report, size_text

if TYPE_CHECKING:  # they need coremltools' protobuf classes, which only this command does
    from fastvlm_convert.mil.description import ValueSpec
    from fastvlm_convert.mil.survey import Survey

EXAMPLES = """
fastvlm-convert mil app/coreml/decoder.mlpackage
fastvlm-convert mil app/coreml/vision.mlpackage --profile
"""
_HONEST = "CPU kernels of this machine, which say nothing about Apple's"


def command(
    context: typer.Context,
    package: Annotated[
        Path, typer.Argument(metavar="FILE.mlpackage", help="An ML program package, from any tool.")
    ],
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Run every function once and show the time by kind of operation."),
    ] = False,
) -> None:
    """Show what is in a Core ML package, on any machine.

    Its functions with their inputs, outputs and states, the operations and the weights.
    """
    from fastvlm_convert.mil.survey import survey_package

    survey = survey_package(package)
    facts = describe(survey, package)
    if profile:
        facts["profile"] = _profile(package)
    report(context, "passed", facts, lambda: _print(survey, facts))


def describe(survey: "Survey", package: Path) -> dict[str, Any]:
    """Everything that `mil` knows without running, as plain data."""
    from fastvlm_convert.mil.plan import knows

    return {
        "package": str(package),
        "specification_version": survey.specification_version,
        "deployment_target": survey.deployment_target,
        "default_function": survey.default_function,
        "functions": {
            name: {
                "opset": function.opset,
                "inputs": [_plain(v) for v in function.spec.inputs],
                "outputs": [_plain(v) for v in function.spec.outputs],
                "states": [_plain(v) for v in function.spec.states],
                "operations": function.operations,
                "unknown_operations": sorted(o for o in function.operations if not knows(o)),
            }
            for name, function in survey.functions.items()
        },
        "weight_bytes": survey.weight_bytes,
        "metadata": survey.metadata,
    }


def _plain(value: "ValueSpec") -> dict[str, Any]:
    flexible = value.flexibility
    return {
        "name": value.name,
        "dtype": value.dtype,
        "shape": list(value.shape),
        "allowed_shapes": None if flexible is None else str(flexible),
        "image": value.color,
        "default": value.default,
        "description": value.description,
    }


def _profile(package: Path) -> dict[str, Any]:
    from fastvlm_convert.mil import Interpreter
    from fastvlm_convert.mil.profile import profile, to_plain

    interpreter = Interpreter(package)
    return {name: to_plain(profile(interpreter, name)) for name in interpreter.functions}


def _print(survey: "Survey", facts: dict[str, Any]) -> None:
    table = plain_table()
    table.add_row(
        "[bold]needs[/]", f"{survey.deployment_target} (specification {survey.specification_version})"
    )
    for name, function in survey.functions.items():
        chosen = " (default)" if name == survey.default_function and len(survey.functions) > 1 else ""
        table.add_row(f"[bold]{escape(name)}[/]", f"{function.opset}{chosen}")
        for kind, values in (
            ("input", function.spec.inputs),
            ("output", function.spec.outputs),
            ("state", function.spec.states),
        ):
            for value in values:
                table.add_row(f"  {kind}", escape(f"{value.name}: {value}"))
        counts = ", ".join(f"{count} {kind}" for kind, count in function.operations.items())
        table.add_row("  operations", escape(counts or "none"))
        unknown = facts["functions"][name]["unknown_operations"]
        if unknown:
            table.add_row("  [yellow]unknown[/]", escape(", ".join(unknown)))
    weights = ", ".join(f"{size_text(count)} {kind}" for kind, count in survey.weight_bytes.items())
    table.add_row("[bold]weights[/]", weights or "none in files")
    for key, text in survey.metadata.items():
        table.add_row(f"[bold]{escape(key)}[/]", escape(text.rstrip()))
    out.print(f"[bold]{escape(facts['package'])}[/]", soft_wrap=True)
    out.print(table)
    for name, found in facts.get("profile", {}).items():
        out.print(f"\n[bold]{escape(name)}[/]: {1e3 * found['seconds']:.1f} ms on {_HONEST}", soft_wrap=True)
        out.print(_times(found))


def _times(found: dict[str, Any]) -> Table:
    numbers = ("count", "ms", "share")
    table = plain_table("operation", *numbers, right=numbers)
    total = sum(v["seconds"] for v in found["operations"].values()) or 1.0
    for kind, value in found["operations"].items():
        share = 100 * value["seconds"] / total
        table.add_row(kind, str(value["count"]), f"{1e3 * value['seconds']:.2f}", f"{share:.0f} %")
    return table
