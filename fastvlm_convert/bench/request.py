"""What a user asks of `bench`: measure, import, compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fastvlm_convert.bench.baseline import load_result
from fastvlm_convert.bench.compare import (
    REFERENCE,
    check_devices,
    check_machines,
    check_names,
    compare_pairs,
    compare_runs,
    require_rounds,
)
from fastvlm_convert.bench.imported.figures import Source
from fastvlm_convert.bench.imported.files import read_figures, read_whole_result
from fastvlm_convert.bench.machine import this_machine
from fastvlm_convert.bench.process import Contender
from fastvlm_convert.bench.result import BenchResult, Settings
from fastvlm_convert.bench.run import bench
from fastvlm_convert.bench.threads import Pinning, pinning
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.manifest import Manifest, load_manifest
from fastvlm_convert.progress import OnShare, ignore_share

DEFAULT_REGRESSION: Final = 5.0
BASELINE: Final = "baseline"
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin")


@dataclass(frozen=True)
class Request:
    """What shall be measured.

    Attributes:
        bundles: Folders of bundles; none measures nothing.
        reference: A checkpoint to run beside them.
        new_tokens: Length of every answer.
        trials: Rounds that count.
        threads: Threads of every runtime; None takes one for each core.
    """

    bundles: tuple[Path, ...]
    reference: Path | None
    new_tokens: int
    trials: int
    threads: int | None


@dataclass(frozen=True)
class _Plan:
    """What will be measured, checked as far as that goes without measuring."""

    contenders: tuple[Contender, ...]
    pinning: Pinning
    image_size: int
    context_length: int


def run_bench(
    request: Request,
    sources: Sequence[Source],
    against: Path | None,
    *,
    max_regression: float,
    any_machine: bool,
    on_progress: OnShare = ignore_share,
) -> BenchResult:
    """Measure, import, and compare with a baseline.

    Args:
        request: What to measure.
        sources: Files of figures to import.
        against: A bundle to measure as well, or a saved result; None compares with nothing.
        max_regression: How much slower is allowed, in percent.
        any_machine: Whether a saved result may be of another machine.
        on_progress: Called with the share of the rounds done, 0..1.

    Raises:
        ConversionError: Something cannot be read, run or compared. What can be seen before, is.
    """
    whole = None if request.bundles else read_whole_result(sources)
    figures = () if whole is not None else read_figures(sources)
    old_bundle = against if against is not None and against.is_dir() else None
    old = None if against is None or old_bundle is not None else load_result(against)
    notes: tuple[str, ...] = ()
    if request.bundles:
        plan = _plan(request, old_bundle)
        if against is not None:
            require_rounds(request.trials, "there would be", None)
        if old is not None:
            names = [c.name for c in plan.contenders] + [f.name for f in figures]
            check_names(names, old, against)
            expected = Settings(request.trials, request.new_tokens, plan.image_size, plan.pinning, ())
            check_machines(BenchResult(this_machine(), expected, ()), old, against, any_machine)
        result = _measure(request, plan, on_progress)
        result = replace(result, contenders=(*result.contenders, *figures))
    else:
        result = whole or BenchResult(None, None, figures)
    if old is not None:
        check_names([c.name for c in result.contenders], old, against)
        notes = check_machines(result, old, against, any_machine)
        notes += check_devices(result, old, against, any_machine)
        comparisons = compare_runs(result, old, max_regression)
    elif old_bundle is not None:
        comparisons = compare_pairs(result, BASELINE, max_regression)
    else:
        return result
    return replace(
        result,
        against=str(against),
        max_regression_percent=max_regression,
        comparisons=comparisons,
        notes=(*result.notes, *notes),
    )


def _plan(request: Request, old_bundle: Path | None) -> _Plan:
    manifests = {bundle: load_manifest(bundle) for bundle in request.bundles}
    contract = manifests[request.bundles[0]].contract
    contenders: list[Contender] = []
    if request.reference is not None:
        weights = [p for p in open_checkpoint(request.reference).files if p.suffix in _WEIGHT_SUFFIXES]
        size = sum(p.stat().st_size for p in weights)
        contenders.append(Contender(REFERENCE, request.reference, None, size))
    if old_bundle is not None:
        contenders += _contenders(old_bundle, load_manifest(old_bundle), BASELINE)
    for bundle, name in _names(request.bundles).items():
        contenders += _contenders(bundle, manifests[bundle], name)
    return _Plan(tuple(contenders), pinning(request.threads), contract.image_size, contract.context_length)


def _contenders(bundle: Path, manifest: Manifest, name: str) -> list[Contender]:
    """Every target of a bundle."""
    found = []
    for target in manifest.targets:
        files = {f for a in manifest.artifacts if a.target == target for f in a.files}
        size = sum(manifest.files[f].size for f in files)
        found.append(Contender(f"{name} {target}", bundle, target, size))
    return found


def _names(bundles: Sequence[Path]) -> Mapping[Path, str]:
    """What to call bundles: their folders' names, or their paths where two have the same."""
    short = [bundle.resolve().name for bundle in bundles]
    return {
        bundle: name
        if short.count(name) == 1 and name not in (REFERENCE, BASELINE)
        else str(bundle.resolve())
        for bundle, name in zip(bundles, short, strict=True)
    }


def _measure(request: Request, plan: _Plan, on_progress: OnShare) -> BenchResult:
    on_progress(0.0)
    return bench(
        plan.contenders,
        plan.pinning,
        image_size=plan.image_size,
        context_length=plan.context_length,
        new_tokens=request.new_tokens,
        trials=request.trials,
        on_progress=on_progress,
    )
