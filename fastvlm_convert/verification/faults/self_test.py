"""Plant every fault in a copy of a bundle, one at a time, and see that verification notices."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, opened
from fastvlm_convert.errors import ConversionError, ImageError
from fastvlm_convert.io_names import Precision
from fastvlm_convert.manifest import Manifest, Status, load_manifest
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle
from fastvlm_convert.targets import Target
from fastvlm_convert.verification.bundle import check_files, make_standard, plan_again
from fastvlm_convert.verification.check import Check, status_of
from fastvlm_convert.verification.execution import Execution
from fastvlm_convert.verification.executions import executions
from fastvlm_convert.verification.faults.bundle_copy import Copy, linked_copy
from fastvlm_convert.verification.faults.catalogue import FAULTS
from fastvlm_convert.verification.faults.fault import (
    BUNDLE,
    EVERY_TARGET,
    Fault,
    NotApplicableError,
    Plant,
    Wrap,
)
from fastvlm_convert.verification.run_target import Standard, run_target

Fate = Literal["caught", "missed", "not_applicable"]

_STAGE: Final = "faults"  # for progress


@dataclass(frozen=True)
class Planted:
    """What became of one fault in one place.

    Attributes:
        fault: Its id.
        what: What is wrong, in a line.
        target: The target it was planted in; `bundle` for the files beside the artifacts.
        fate: `caught` if a check failed, `missed` if all passed or could not be run, and `not_applicable`
            where the bundle has no place for it.
        checks: The checks that failed, of the first stage where any did.
        reason: Why it is not applicable, or what could not be run when it was missed.
    """

    fault: str
    what: str
    target: str
    fate: Fate
    checks: tuple[Check, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class SelfTest:
    """Whether the gates of a bundle can fail.

    Attributes:
        control: Checks of the bundle itself. If one fails, no fault is planted; if one could not be run, none
            in its target.
        planted: Every fault, by where it was planted.
    """

    control: tuple[Check, ...]
    planted: tuple[Planted, ...]

    @property
    def status(self) -> Status:
        """Failed if a fault was missed or the bundle itself fails; not run if that could not be told."""
        if any(planted.fate == "missed" for planted in self.planted):
            return "failed"
        return status_of(self.control)


def self_test(
    bundle: str | Path,
    reference: str | Path | Checkpoint,
    questions: Sequence[Question],
    *,
    faults: Sequence[Fault] = FAULTS,
    interpret: bool = False,
    on_progress: OnStage = ignore_stage,
) -> SelfTest:
    """Plant faults in copies of a bundle and verify each copy; the bundle itself is not changed.

    One question is asked, about a picture that is not square, because cropping shows there. A copy is judged
    until the first stage that fails: its files, then one execution of a target after the other, that with the
    most gates first.

    Args:
        bundle: Its folder.
        reference: The checkpoint's folder, or what `open_checkpoint` made of it.
        questions: At least one about a picture.
        faults: What to plant.
        interpret: On a Mac, interpret Core ML packages beside running them.
        on_progress: Called with what is being done and the share of it that is done, 0..1.

    Raises:
        ConversionError: The bundle, the checkpoint or the pictures cannot be read, there is no picture, or
            the reference is another model.
    """
    bundle, checkpoint = Path(bundle).resolve(), opened(reference)
    manifest = load_manifest(bundle)
    plan = plan_again(checkpoint, manifest)
    standard, found = make_standard(plan, manifest, _one(questions), on_progress)
    court = _Court(bundle, manifest, checkpoint, standard, interpret)
    # What the integers cost is no matter of the bundle's files, and one question cannot tell it.
    control = [check for check in found.checks if check.target == BUNDLE]
    control += [check for checks in _judged(court, bundle, BUNDLE, None) for check in checks]
    if any(check.status == "failed" for check in control):
        return SelfTest(tuple(control), ())
    not_run = {check.target for check in control if check.status == "not_run"}
    runnable = [target for target in manifest.targets if target not in not_run]
    places = [(fault, where) for where in (BUNDLE, *runnable) for fault in faults]
    planted: list[Planted] = []
    for number, (fault, where) in enumerate(places):
        if (plant := _plant_of(fault, where)) is not None:
            planted.append(_planted(court, fault, where, plant))
        elif fault.absent and where != BUNDLE:
            planted.append(Planted(fault.id, fault.what, where, "not_applicable", reason=fault.absent))
        on_progress(_STAGE, (number + 1) / len(places))
    return SelfTest(tuple(control), tuple(planted))


@dataclass(frozen=True)
class _Court:
    """What every copy is judged by.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        checkpoint: What it was made from.
        standard: What its targets are held against.
        interpret: Whether to interpret Core ML packages beside running them.
    """

    bundle: Path
    manifest: Manifest
    checkpoint: Checkpoint
    standard: Standard
    interpret: bool


def _one(questions: Sequence[Question]) -> Sequence[Question]:
    """A question whose first picture is not square; where all are, one loses a quarter of its rows."""
    with_pictures = [question for question in questions if question.images]
    if not with_pictures:
        raise ImageError("there are no pictures to plant faults with", hint="give at least one")
    chosen = next((q for q in with_pictures if q.images[0].width != q.images[0].height), with_pictures[0])
    first, *others = chosen.images
    if first.width == first.height:
        first = first.crop((0, 0, first.width, max(1, first.height * 3 // 4)))
    return (replace(chosen, images=(first, *others)),)


def _plant_of(fault: Fault, where: str) -> Plant | None:
    if where == BUNDLE:
        return fault.plants.get(where)
    return fault.plants.get(where, fault.plants.get(EVERY_TARGET))


def _planted(court: _Court, fault: Fault, where: str, plant: Plant) -> Planted:
    """Plant a fault somewhere in a copy, and judge it."""
    bundle = court.bundle
    result = Planted(fault.id, fault.what, where, "not_applicable")
    # Beside the bundle, where links to its files can be made.
    beside = bundle.parent if os.access(bundle.parent, os.W_OK) else None
    with TemporaryDirectory(prefix=f".{bundle.name}.", dir=beside) as folder:
        copy = Copy(linked_copy(bundle, Path(folder)), bundle, court.manifest, court.standard.plan, where)
        try:
            wrap = plant(copy)
        except NotApplicableError as error:
            return replace(result, reason=str(error))
        copy.rehash()
        return _verdict(court, result, copy.path, wrap)


def _verdict(court: _Court, result: Planted, copy: Path, wrap: Wrap | None) -> Planted:
    skipped: list[str] = []
    try:
        for checks in _judged(court, copy, result.target, wrap):
            failed = tuple(check for check in checks if check.status == "failed")
            if failed:
                return replace(result, fate="caught", checks=failed, reason=None)
            skipped += [check.reason or "" for check in checks if check.status == "not_run"]
    except ConversionError as error:
        skipped.append(str(error))
    reason = f"could not be run: {skipped[0]}" if skipped else "every check passed"
    return replace(result, fate="missed", reason=reason)


def _judged(court: _Court, bundle: Path, where: str, wrap: Wrap | None) -> Iterator[Sequence[Check]]:
    """What `verify` checks of a bundle, stage by stage: its files, then every way to run its targets.

    Args:
        court: What it is judged by.
        bundle: Its folder.
        where: The target to run; `bundle` for all of them.
        wrap: What the app around it does.
    """
    manifest, standard = load_manifest(bundle), court.standard
    # The recipe is that of the bundle under test, so a fault in it changes what the bundle is held against.
    is_same = (manifest.recipe, manifest.targets) == (court.manifest.recipe, court.manifest.targets)
    plan = standard.plan if is_same else plan_again(court.checkpoint, manifest)
    yield check_files(bundle, manifest, plan)
    if not is_same:
        standard, _ = make_standard(plan, manifest, standard.questions)

    def open_target(path: Path, target: Target, precision: Precision | None) -> LoadedModel:
        model = load_bundle(path, target, precision)
        return model if wrap is None else wrap(model)

    for target in manifest.targets:
        if where in (BUNDLE, target):
            for execution in sorted(executions(manifest, target, court.interpret), key=_leniency):
                run = run_target(bundle, target, execution, standard, open_target=open_target)
                yield run.all_checks


def _leniency(execution: Execution) -> int:
    return -len(execution.gates.min_sqnr_db)
