"""`fastvlm-convert doctor`: what this installation and this machine can do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert import __version__
from fastvlm_convert.amounts import count_text, size_text
from fastvlm_convert.cli.console import out, plain_table, report, status_text, waiting
from fastvlm_convert.cli.document import EXIT_CODES, Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.doctor.examine import Ability, Diagnosis, Need, examine
from fastvlm_convert.doctor.libraries import Library
from fastvlm_convert.doctor.machine import Machine
from fastvlm_convert.errors import printable
from fastvlm_convert.outcomes import Outcome

EXAMPLES = """
fastvlm-convert doctor
fastvlm-convert doctor FastVLM-7B --strict
"""


@dataclass(frozen=True)
class DoctorDocument(Document, name="doctor", statuses=("passed", "failed")):
    """What this installation and this machine can do.

    Attributes:
        tool: Version of fastvlm-convert.
        strict: Whether a warning fails, too.
        machine: This machine.
        libraries: What the tool uses.
        abilities: What can be done here, and what cannot.
        needs: What a checkpoint's exports take; empty without a checkpoint.
        outcomes: One for each thing that was looked at.
    """

    tool: str
    strict: bool
    machine: Machine
    libraries: tuple[Library, ...]
    abilities: tuple[Ability, ...]
    needs: tuple[Need, ...]
    outcomes: tuple[Outcome, ...]


def command(
    context: typer.Context,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="Also compare what its exports need with what is here.",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail for a warning, too.")] = False,
) -> None:
    """Say what runs here, what cannot, and why.

    Versions, each library loaded once, known-bad pairs of versions, disk and memory. The exit code is 1 if
    something is broken; what is only not installed is none of that.
    """
    with waiting("loading libraries", flags_of(context).is_silent):
        found = examine(checkpoint)
    bad = {"error", "warning"} if strict else {"error"}
    failed = [outcome for outcome in found.outcomes if outcome.status == "failed"]
    status = "failed" if any(outcome.severity in bad for outcome in failed) else "passed"
    document = DoctorDocument(
        tool=__version__,
        strict=strict,
        machine=found.machine,
        libraries=found.libraries,
        abilities=found.abilities,
        needs=found.needs,
        outcomes=found.outcomes,
    )
    able = sum(ability.here for ability in found.abilities)
    problems = count_text(len(failed), "problem")
    verdict = f"{status}: {problems}; {able} of {len(found.abilities)} abilities"
    show = lambda: _print(found, failed, verdict.replace(status, status_text(status), 1))  # noqa: E731
    report(context, status, document, show, brief=verdict)
    if status == "failed":
        raise typer.Exit(EXIT_CODES[status])


def _print(found: Diagnosis, failed: list[Outcome], verdict: str) -> None:
    _print_machine(found.machine)
    table = plain_table("library", "version", "made for", "extra", "state")
    for library in found.libraries:
        state = library.state if library.problem is None else library.problem
        version, extra = library.installed or "-", library.extra or ""
        table.add_row(library.name, version, escape(library.required), extra, escape(printable(state)))
    out.print(table)
    out.print()
    table = plain_table("what", "here", wrap=("here",))
    for ability in found.abilities:
        reason = "yes" if ability.reason is None else f"no: {ability.reason}"
        table.add_row(escape(ability.what), escape(printable(reason)))
    out.print(table)
    if found.needs:
        out.print()
        _print_needs(found.needs)
    out.print()
    for outcome in failed:
        place = "" if outcome.where is None else f"{outcome.where}: "
        text = f"{place}{outcome.message}"
        out.print(f"{outcome.severity}: {escape(outcome.id)}: {escape(printable(text))}", soft_wrap=True)
    out.print(verdict, soft_wrap=True)


def _print_machine(machine: Machine) -> None:
    free = "" if machine.available_bytes is None else f", {size_text(machine.available_bytes)} of it free"
    table = plain_table()
    table.add_row("[bold]fastvlm-convert[/]", f"{__version__}, Python {machine.python}")
    cpus = count_text(machine.cpus, "CPU")
    table.add_row("[bold]machine[/]", escape(f"{machine.system}, {machine.architecture}, {cpus}"))
    table.add_row("[bold]memory[/]", f"{size_text(machine.memory_bytes)}{free}")
    table.add_row("[bold]disk[/]", f"{size_text(machine.free_disk_bytes)} free in the current folder")
    out.print(table)
    out.print()


def _print_needs(needs: tuple[Need, ...]) -> None:
    numbers = ("disk", "memory")
    table = plain_table("recipe", "targets", *numbers, "fits", right=numbers, wrap=("fits",))
    for need in needs:
        fits = "yes" if need.fits else f"no: {need.reason}"
        sizes = (size_text(need.disk_bytes), size_text(need.memory_bytes)) if need.targets else ("-", "-")
        table.add_row(need.recipe, ", ".join(need.targets) or "-", *sizes, escape(printable(fits)))
    out.print(table)
