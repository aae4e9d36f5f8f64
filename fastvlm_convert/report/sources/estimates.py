"""What `estimate` says of phones, by its own function."""

from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.errors import MissingDependencyError
from fastvlm_convert.estimate.ceilings import Ceiling, estimate
from fastvlm_convert.estimate.phones import Fact, Phone, shipped_phones
from fastvlm_convert.report.sources.not_run import NotRun


@dataclass(frozen=True)
class Sourced:
    """A published figure of a phone.

    Attributes:
        phone: Its name.
        what: The figure, in words.
        basis: What it rests on.
        date: When its source says so.
        source: Where it stands.
    """

    phone: str
    what: str
    basis: str
    date: str
    source: str


@dataclass(frozen=True)
class Estimates:
    """Ceilings of phones.

    Attributes:
        label: What they are, to be shown with them.
        ceilings: By phone and target.
        not_run: Targets that were not looked into, with the reason.
        notes: Where a ceiling may not be one.
        sources: The figures that ceilings rest on.
    """

    label: str
    ceilings: tuple[Ceiling, ...]
    not_run: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sources: tuple[Sourced, ...]


def read_estimates(bundle: Path, command: str) -> Estimates | NotRun:
    """What phones could do with a bundle at best.

    Args:
        bundle: Its folder.
        command: What makes an estimate.

    Raises:
        BundleError: The bundle is damaged.
    """
    try:
        found = estimate(bundle, shipped_phones())
    except MissingDependencyError as error:
        return NotRun(str(error), command)
    return Estimates(
        label=found.label,
        ceilings=found.ceilings,
        not_run=tuple((missing.target, missing.reason) for missing in found.not_run),
        notes=found.notes,
        sources=tuple(source for phone in found.phones for source in _sources(phone)),
    )


def _sources(phone: Phone) -> list[Sourced]:
    facts = (
        (phone.ram_gb, "GB of memory"),
        (phone.app_limit_gb, "GB for an app"),
        (phone.bandwidth_gb_per_s, "GB/s"),
    )
    found = [
        Sourced(phone.name, f"{fact.value:g} {unit}", fact.basis, fact.date, fact.source)
        for fact, unit in facts
        if isinstance(fact, Fact)
    ]
    for peak in phone.peaks:
        what = f"{peak.tera_operations_per_s:g} TOPS, {peak.unit}, {peak.arithmetic}"
        found.append(Sourced(phone.name, what, peak.basis, peak.date, peak.source))
    return found
