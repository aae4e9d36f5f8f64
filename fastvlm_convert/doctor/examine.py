"""Put together what `doctor` tells."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert import __version__
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, opened
from fastvlm_convert.doctor.libraries import DISTRIBUTION, Library, libraries
from fastvlm_convert.doctor.machine import Machine, this_machine
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.lint.platform import version_numbers
from fastvlm_convert.lint.versions import bad_pairs
from fastvlm_convert.outcomes import Outcome, Severity
from fastvlm_convert.pipeline import plan
from fastvlm_convert.recipe import shipped_recipes
from fastvlm_convert.runtime.core_ml import has_core_ml
from fastvlm_convert.targets import DEFAULT_TARGETS

# What can be done -> the libraries that it takes.
_ABILITIES: Final[Mapping[str, tuple[str, ...]]] = {
    "export ONNX bundles": ("onnx",),
    "run ONNX bundles": ("onnx", "onnxruntime"),
    "export Core ML bundles": ("coremltools",),
    "run Core ML packages in the interpreter": ("coremltools", "torch"),
    "export MLX bundles": (),
    "run MLX bundles": ("mlx",),
    "calibrate, verify, run checkpoints": ("torch",),
    "read checkpoints by their id on Hugging Face": ("huggingface-hub",),
    "read HEIC pictures": ("pillow-heif",),
    "sign bundles": ("model-signing",),
}
_ON_APPLE: Final = "run Core ML packages with Apple's kernels"
_ON_PHONES: Final = "run bundles on a phone"


@dataclass(frozen=True)
class Ability:
    """Something that this tool can do.

    Attributes:
        what: What it is.
        here: Whether it can be done here.
        reason: Why not; None if it can.
    """

    what: str
    here: bool
    reason: str | None


@dataclass(frozen=True)
class Need:
    """What an export of a checkpoint takes.

    Attributes:
        recipe: Name of a shipped recipe.
        targets: Default targets that take it.
        disk_bytes: The bundle.
        memory_bytes: The peak, predicted.
        fits: Whether this machine has both.
        reason: What it lacks, or why the recipe does not suit the model; None if nothing.
    """

    recipe: str
    targets: tuple[str, ...]
    disk_bytes: int
    memory_bytes: int
    fits: bool
    reason: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `doctor` found.

    Attributes:
        machine: This machine.
        libraries: What the tool uses.
        abilities: What can be done here, and what cannot.
        needs: What a checkpoint's exports take; none without a checkpoint.
        outcomes: One for each thing that was looked at.
    """

    machine: Machine
    libraries: tuple[Library, ...]
    abilities: tuple[Ability, ...]
    needs: tuple[Need, ...]
    outcomes: tuple[Outcome, ...]


def examine(checkpoint: str | Path | Checkpoint | None = None) -> Diagnosis:
    """Look at the installation, the machine and what a checkpoint needs of it.

    Args:
        checkpoint: A checkpoint's folder, or what `open_checkpoint` made of it; None looks at no needs.

    Raises:
        CheckpointError: It is no checkpoint.
    """
    machine, used = this_machine(), libraries()
    abilities = tuple(_abilities({library.name: library for library in used}))
    needs = () if checkpoint is None else tuple(_needs(opened(checkpoint), machine))
    present = {lib.name: version_numbers(lib.installed) for lib in used if lib.installed is not None}
    present |= {**machine.versions, DISTRIBUTION: version_numbers(__version__)}
    outcomes = [_of_library(library) for library in used]
    outcomes += [
        Outcome(pair.id, pair.severity, "failed", f"{pair.reason}; {pair.advice} ({pair.source})")
        for pair in bad_pairs(present)
    ]
    outcomes += [_of_ability(ability) for ability in abilities]
    outcomes += _of_needs(needs)
    return Diagnosis(machine, used, abilities, needs, tuple(outcomes))


def _abilities(used: Mapping[str, Library]) -> Iterator[Ability]:
    for what, names in _ABILITIES.items():
        problems = [f"{n} {used[n].problem}" for n in names if used[n].state in ("missing", "broken")]
        yield Ability(what, not problems, "; ".join(problems) or None)
    why = None if has_core_ml() else "Core ML is a part of macOS; the interpreter runs the program, not them"
    if why is None and used["coremltools"].state in ("missing", "broken"):
        why = f"coremltools {used['coremltools'].problem}"
    yield Ability(_ON_APPLE, why is None, why)
    yield Ability(_ON_PHONES, False, "copy the bundle there: docs/ios.md and docs/android.md say how")


def _needs(checkpoint: Checkpoint, machine: Machine) -> Iterator[Need]:
    for name in shipped_recipes():
        targets, why = _targets_of(checkpoint, name)
        if not targets:
            yield Need(name, (), 0, 0, False, why)
            continue
        planned = plan(checkpoint, recipe=name, targets=targets)
        disk, memory = planned.total_bytes, planned.peak_memory_bytes
        lacking = [
            f"{what}: {need:,} bytes of {have:,}"
            for what, need, have in (
                ("disk", disk, machine.free_disk_bytes),
                ("memory", memory, machine.memory_bytes),
            )
            if need > have
        ]
        yield Need(name, tuple(targets), disk, memory, not lacking, "; ".join(lacking) or None)


def _targets_of(checkpoint: Checkpoint, recipe: str) -> tuple[list[str], str | None]:
    """The default targets that take a recipe for a checkpoint, and why one of the others does not."""
    found: list[str] = []
    why = None
    for target in DEFAULT_TARGETS:
        try:
            plan(checkpoint, recipe=recipe, targets=[target])
        except (RecipeError, TargetError) as error:
            why = str(error)
        else:
            found.append(target)
    return found, why


def _of_library(library: Library) -> Outcome:
    name = f"library-{library.name}"
    if library.state == "ready":
        return Outcome(name, "error", "passed", f"{library.installed} ({library.required or 'any'})")
    problem = library.problem or ""
    if library.state == "missing" and library.extra is not None:
        return Outcome(name, "info", "not_run", problem)  # optional, by the user's choice
    return Outcome(name, "warning" if library.state == "untested" else "error", "failed", problem)


def _of_ability(ability: Ability) -> Outcome:
    status = Outcome("ability", "info", "passed", "can be done here", ability.what)
    if ability.here:
        return status
    return Outcome("ability", "info", "not_run", ability.reason or "", ability.what)


def _of_needs(needs: Sequence[Need]) -> Iterator[Outcome]:
    """A recipe that does not fit is a warning; an error if none does."""
    severity: Severity = "warning" if any(need.fits for need in needs) else "error"
    for need in needs:
        if not need.targets:
            yield Outcome("needs", "info", "not_run", need.reason or "", need.recipe)
        else:
            fits = f"{need.disk_bytes:,} bytes of disk, {need.memory_bytes:,} of memory"
            message = need.reason or fits
            yield Outcome("needs", severity, "passed" if need.fits else "failed", message, need.recipe)
