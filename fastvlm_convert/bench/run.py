"""Measure contenders interleaved in one run: on a shared machine only ratios from one run can be trusted."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

from fastvlm_convert.bench.machine import this_machine
from fastvlm_convert.bench.process import Contender, WorkerProcess
from fastvlm_convert.bench.result import (
    CALIBRATION,
    ENERGY,
    KNOWN,
    BenchResult,
    ContenderResult,
    Settings,
    median_ratio,
    spreads_of,
)
from fastvlm_convert.bench.threads import Pinning
from fastvlm_convert.progress import OnShare, ignore_share

_CHOOSES_THREADS: Final = ("Core ML", "mlx")


def bench(
    contenders: Sequence[Contender],
    pinning: Pinning,
    *,
    image_size: int,
    context_length: int,
    new_tokens: int,
    trials: int,
    on_progress: OnShare = ignore_share,
) -> BenchResult:
    """Measure contenders round by round, each in its own process, all alive at once.

    More than six parameters: a measurement is only worth something if all of them are said.

    Args:
        contenders: The first is the reference where it is a checkpoint.
        pinning: Threads and processors of every contender.
        image_size: Edge of the input that a checkpoint is run with, in pixels.
        context_length: Tokens of a checkpoint's KV cache.
        new_tokens: Length of every answer.
        trials: Rounds that count, after one whose figures are kept apart.
        on_progress: Called with the share of the rounds done, 0..1.

    Raises:
        ConversionError: A contender cannot be loaded or run.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(c, pinning)) for c in (*contenders, None)]
        loaded = [w.load(image_size, context_length) for w in workers]
        rounds: list[list[dict[str, Any]]] = [[] for _ in workers]
        for number in range(trials + 1):
            for worker, measured in zip(workers, rounds, strict=True):
                measured.append(worker.trial(new_tokens))
            on_progress((number + 1) / (trials + 1))
    machine = this_machine()
    results = [
        _result(contender, machine.title, load, measured)
        for contender, load, measured in zip(contenders, loaded[:-1], rounds[:-1], strict=True)
    ]
    if contenders[0].target is None:
        results = [_with_ratios(result, results[0]) for result in results]
    calibration = tuple(float(m[CALIBRATION]) for m in rounds[-1][1:])
    return BenchResult(
        machine=machine,
        settings=Settings(trials, new_tokens, image_size, pinning, calibration),
        contenders=tuple(results),
        notes=_notes(results),
    )


def _result(
    contender: Contender, machine: str, load: dict[str, Any], measured: list[dict[str, Any]]
) -> ContenderResult:
    warmup, *counted = measured
    samples = {m: tuple(float(r[m]) for r in counted) for m in KNOWN if m in warmup}
    energy_not_run = load["energy_not_run"]
    if min(samples.get(ENERGY, (1.0,))) <= 0:
        del samples[ENERGY]
        energy_not_run = "the host's counter stood still during an answer"
    return ContenderResult(
        name=contender.name,
        executed_by=load["executed_by"],
        measured_on=machine,
        imported_from=None,
        load_ms=load["load_ms"],
        peak_memory_bytes=max(m["peak_memory_bytes"] for m in measured),
        file_bytes=contender.file_bytes,
        warmup={m: float(warmup[m]) for m in KNOWN if m in warmup},
        metrics=spreads_of(samples),
        samples=samples,
        ratio_to_reference={},
        ratio_interval={},
        energy_not_run=energy_not_run,
    )


def _with_ratios(result: ContenderResult, reference: ContenderResult) -> ContenderResult:
    """The same with its ratios to the reference, paired by round."""
    pairs = {
        metric: median_ratio(ours, reference.samples[metric])
        for metric, ours in result.samples.items()
        if metric in reference.samples
    }
    return replace(
        result,
        ratio_to_reference={metric: ratio for metric, (ratio, _) in pairs.items()},
        ratio_interval={metric: found for metric, (_, found) in pairs.items() if found is not None},
    )


def _notes(results: Sequence[ContenderResult]) -> tuple[str, ...]:
    if sys.platform != "darwin":
        return ()
    free = [r for r in results if r.executed_by.startswith(_CHOOSES_THREADS)]
    return tuple(f"{r.name}: {r.executed_by} chooses its own threads and processors" for r in free)
