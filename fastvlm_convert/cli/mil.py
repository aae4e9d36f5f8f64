"""`fastvlm-convert mil`: what is in a Core ML package, and where its time goes; runs on any machine."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.amounts import size_text
from fastvlm_convert.cli.console import out, plain_table, report
from fastvlm_convert.cli.document import Document

if TYPE_CHECKING:  # they need coremltools' protobuf classes, which only this command does
    from fastvlm_convert.mil.description import ValueSpec
    from fastvlm_convert.mil.profile import Profile
    from fastvlm_convert.mil.survey import Survey

EXAMPLES = """
fastvlm-convert mil app/coreml/decoder.mlpackage
fastvlm-convert mil app/coreml/vision.mlpackage --profile
"""
_HONEST = "CPU kernels of this machine, which say nothing about Apple's"


@dataclass(frozen=True)
class ValueFacts:
    """An input, output or state of a function.

    Attributes:
        name: What it is called.
        dtype: Of its elements.
        shape: Its dimensions; None for a flexible one.
        allowed_shapes: Which ones a flexible one may have, else None.
        image: Order of the channels if it is an image, else None.
        default: The number that fills an optional input that is not given; None if it is required.
        description: What the author says of it.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    allowed_shapes: str | None
    image: str | None
    default: float | None
    description: str


@dataclass(frozen=True)
class FunctionFacts:
    """One function.

    Attributes:
        opset: The set of operations it is written in.
        inputs: What it takes.
        outputs: What it gives.
        states: What it keeps.
        operations: How often each occurs.
        unknown_operations: Those that the interpreter cannot run.
    """

    opset: str
    inputs: tuple[ValueFacts, ...]
    outputs: tuple[ValueFacts, ...]
    states: tuple[ValueFacts, ...]
    operations: dict[str, int]
    unknown_operations: tuple[str, ...]


@dataclass(frozen=True)
class TimeFacts:
    """Operations of one kind: how many, and the time they took."""

    count: int
    seconds: float


@dataclass(frozen=True)
class ProfileFacts:
    """One run of a function.

    Attributes:
        seconds: All of it.
        operations: By kind, the slowest first.
        nonfinite: Operations that gave NaN or infinity.
    """

    seconds: float
    operations: dict[str, TimeFacts]
    nonfinite: tuple[str, ...]


@dataclass(frozen=True)
class MilDocument(Document, name="mil"):
    """What is in a Core ML package.

    Attributes:
        package: The package's folder.
        specification_version: Version of the file format.
        deployment_target: The oldest system it runs on.
        default_function: The function that runs when none is named.
        functions: By name.
        weight_bytes: By element type.
        metadata: What the author wrote into it.
        profile: By function, with `--profile`; else None.
    """

    package: str
    specification_version: int
    deployment_target: str
    default_function: str
    functions: dict[str, FunctionFacts]
    weight_bytes: dict[str, int]
    metadata: dict[str, str]
    profile: dict[str, ProfileFacts] | None


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
        facts = replace(facts, profile=_profile(package))
    report(context, "passed", facts, lambda: _print(survey, facts))


def describe(survey: "Survey", package: Path) -> MilDocument:
    """Everything that `mil` knows without running."""
    from fastvlm_convert.mil.plan import knows

    return MilDocument(
        package=str(package),
        specification_version=survey.specification_version,
        deployment_target=survey.deployment_target,
        default_function=survey.default_function,
        functions={
            name: FunctionFacts(
                opset=function.opset,
                inputs=tuple(_value_facts(v) for v in function.spec.inputs),
                outputs=tuple(_value_facts(v) for v in function.spec.outputs),
                states=tuple(_value_facts(v) for v in function.spec.states),
                operations=function.operations,
                unknown_operations=tuple(sorted(o for o in function.operations if not knows(o))),
            )
            for name, function in survey.functions.items()
        },
        weight_bytes=dict(survey.weight_bytes),
        metadata=dict(survey.metadata),
        profile=None,
    )


def _value_facts(value: "ValueSpec") -> ValueFacts:
    flexible = value.flexibility
    return ValueFacts(
        name=value.name,
        dtype=value.dtype,
        shape=tuple(value.shape),
        allowed_shapes=None if flexible is None else str(flexible),
        image=value.color,
        default=value.default,
        description=value.description,
    )


def _profile(package: Path) -> dict[str, ProfileFacts]:
    from fastvlm_convert.mil import Interpreter
    from fastvlm_convert.mil.profile import profile

    interpreter = Interpreter(package)
    return {name: _profile_facts(profile(interpreter, name)) for name in interpreter.functions}


def _profile_facts(found: "Profile") -> ProfileFacts:
    return ProfileFacts(
        seconds=found.seconds,
        operations={t.type: TimeFacts(t.count, t.seconds) for t in found.operations},
        nonfinite=tuple(str(n) for n in found.nonfinite),
    )


def _print(survey: "Survey", facts: MilDocument) -> None:
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
        unknown = facts.functions[name].unknown_operations
        if unknown:
            table.add_row("  [yellow]unknown[/]", escape(", ".join(unknown)))
    weights = ", ".join(f"{size_text(count)} {kind}" for kind, count in survey.weight_bytes.items())
    table.add_row("[bold]weights[/]", weights or "none in files")
    for key, text in survey.metadata.items():
        table.add_row(f"[bold]{escape(key)}[/]", escape(text.rstrip()))
    out.print(f"[bold]{escape(facts.package)}[/]", soft_wrap=True)
    out.print(table)
    for name, found in (facts.profile or {}).items():
        out.print(f"\n[bold]{escape(name)}[/]: {1e3 * found.seconds:.1f} ms on {_HONEST}", soft_wrap=True)
        out.print(_times(found))


def _times(found: ProfileFacts) -> Table:
    numbers = ("count", "ms", "share")
    table = plain_table("operation", *numbers, right=numbers)
    total = sum(v.seconds for v in found.operations.values()) or 1.0
    for kind, value in found.operations.items():
        share = 100 * value.seconds / total
        table.add_row(kind, str(value.count), f"{1e3 * value.seconds:.2f}", f"{share:.0f} %")
    return table
