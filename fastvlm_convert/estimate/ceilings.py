"""What phones could do with a bundle at best: ceilings from files and from what is published of the phones.

A ceiling is no prediction. A token cannot take less time than its bytes take through the memory, nor a
picture less than its operations take at a chip's peak; real runs take longer, and this does not say by how
much.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fastvlm_convert.errors import MissingDependencyError, PhonesError
from fastvlm_convert.estimate.phones import Arithmetic, OperatingSystem, Phone, UnitName, known
from fastvlm_convert.estimate.work import Work
from fastvlm_convert.estimate.workload import TargetWork, target_work
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.targets import Target

LABEL: Final = "an estimate, not a measurement: ceilings from files and published peaks"
_GB: Final = 1e9
_CACHES: Final = 64e6  # bytes; the largest that is reported of a phone, the A19 Pro's, adds up to 54 MB
_TERA: Final = 1e12
_RUN_ON: Final[dict[Target, tuple[OperatingSystem, ...]]] = {
    "onnx": ("android", "ios"),
    "coreml": ("ios",),
    "mlx": ("ios",),
}


@dataclass(frozen=True)
class FirstToken:
    """The least time to the first token on one part of a chip.

    Attributes:
        unit: The part.
        arithmetic: What its peak is counted in.
        seconds: At least so many, for the picture and the decoder's pass over the picture's tokens.
    """

    unit: UnitName
    arithmetic: Arithmetic
    seconds: float


@dataclass(frozen=True)
class Ceiling:
    """What a phone could do with a target at best.

    Attributes:
        phone: Its name.
        target: The format.
        decode_after_picture: Tokens a second at most, right after the picture; None where unknown.
        decode_at_context: Tokens a second at most, at the end of the context; None where unknown.
        first_token: By part of the chip whose peak is published.
        first_token_memory_s: Seconds that memory alone takes at least; None where unknown.
        memory_bytes: What the bundle needs: files, cache, results of operations.
        limit_bytes: Memory at which the system ends an app; None where unknown.
        fits: Whether it stays below that limit; False also where it exceeds the phone's whole memory.
        unknown: What is not published of the phone, so that something here is None.
    """

    phone: str
    target: Target
    decode_after_picture: float | None
    decode_at_context: float | None
    first_token: tuple[FirstToken, ...]
    first_token_memory_s: float | None
    memory_bytes: int
    limit_bytes: int | None
    fits: bool | None
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class NotRun:
    """A target of which there is no estimate.

    Attributes:
        target: The format.
        status: Always `not_run`.
        reason: Why.
    """

    target: Target
    status: Literal["not_run"]
    reason: str


@dataclass(frozen=True)
class Estimate:
    """What phones could do with a bundle at best.

    Attributes:
        label: What this is, to be shown wherever a number of it is.
        targets: What each target takes.
        ceilings: By phone and target, where the phone can run it.
        not_run: Targets that could not be looked into.
        notes: Where a ceiling may not be one.
        phones: The phones, with sources.
    """

    label: str
    targets: tuple[TargetWork, ...]
    ceilings: tuple[Ceiling, ...]
    not_run: tuple[NotRun, ...]
    notes: tuple[str, ...]
    phones: tuple[Phone, ...]


def estimate(bundle: Path, phones: Sequence[Phone]) -> Estimate:
    """What phones could do with a bundle at best; reads headers and graphs, no weights.

    Args:
        bundle: Its folder.
        phones: The phones.

    Raises:
        BundleError: It is no bundle, or damaged.
        MissingDependencyError: None of its formats can be read, because packages are not installed.
        PhonesError: There is no phone.
    """
    if not phones:
        raise PhonesError("there is no phone to estimate for")
    manifest = load_manifest(bundle)
    works: list[TargetWork] = []
    missing: list[NotRun] = []
    for target in manifest.targets:
        try:
            works.append(target_work(bundle, manifest, target))
        except MissingDependencyError as error:
            if len(missing) == len(manifest.targets) - 1:
                raise
            missing.append(NotRun(target, "not_run", str(error)))
    ceilings = [
        ceiling(phone, work) for work in works for phone in phones if phone.os in _RUN_ON[work.target]
    ]
    notes = tuple(
        f"a token of {work.target} reads {work.decode_after_picture.read_bytes / 1e6:.1f} MB, which "
        "the caches of some chips hold: memory is no ceiling then"
        for work in works
        if work.decode_after_picture.read_bytes < _CACHES
    )
    return Estimate(LABEL, tuple(works), tuple(ceilings), tuple(missing), notes, tuple(phones))


def ceiling(phone: Phone, work: TargetWork) -> Ceiling:
    """What a phone could do with a target at best."""
    bandwidth, ram, limit = (
        known(fact) for fact in (phone.bandwidth_gb_per_s, phone.ram_gb, phone.app_limit_gb)
    )
    steps = (work.vision, work.prefill)
    rates = [
        None if bandwidth is None else _GB * bandwidth / step.read_bytes
        for step in (work.decode_after_picture, work.decode_at_context)
    ]
    first = tuple(
        FirstToken(
            peak.unit,
            peak.arithmetic,
            sum(_seconds(step, bandwidth, peak.tera_operations_per_s) for step in steps),
        )
        for peak in phone.peaks
    )
    fits = None if limit is None else work.memory_bytes <= limit * _GB
    if ram is not None and work.memory_bytes > ram * _GB:
        fits = False
    return Ceiling(
        phone=phone.name,
        target=work.target,
        decode_after_picture=rates[0],
        decode_at_context=rates[1],
        first_token=first,
        first_token_memory_s=(
            None if bandwidth is None else sum(step.read_bytes for step in steps) / (_GB * bandwidth)
        ),
        memory_bytes=work.memory_bytes,
        limit_bytes=None if limit is None else round(limit * _GB),
        fits=fits,
        unknown=tuple(
            what
            for what, value in (
                ("memory bandwidth", bandwidth),
                ("memory", ram),
                ("an app's memory limit", limit),
                ("peak operations", phone.peaks or None),
            )
            if value is None
        ),
    )


def _seconds(step: Work, bandwidth: float | None, peak: float) -> float:
    """A step takes as long as what takes longer: its operations, or its bytes."""
    computing = 2 * step.macs / (_TERA * peak)
    return computing if bandwidth is None else max(computing, step.read_bytes / (_GB * bandwidth))
