"""What every format of imported figures comes down to."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fastvlm_convert.bench.baseline import check_samples
from fastvlm_convert.bench.result import RUN, ContenderResult, spreads_of

# What a file of one graph's runs measures of an answer, by what users call it.
STAGES: Final = {"vision": "vision_ms", "prefill": "prefill_ms", "decode": "decode_ms"}


@dataclass(frozen=True)
class Source:
    """A file to import.

    Attributes:
        path: The file, or Xcode's folder.
        stage: Which part of an answer its graph is; None where nobody says.
        device: What was measured, where the file does not say; None where nobody says.
    """

    path: Path
    stage: str | None
    device: str | None

    @property
    def metric(self) -> str:
        """The metric that its times are of."""
        return RUN if self.stage is None else STAGES[self.stage]

    def name_of(self, model: str, where: str) -> str:
        """The contender's name: parts of one answer are one contender, a graph alone is one of its own.

        Args:
            model: What the file calls the graph.
            where: Device and runtime.
        """
        return where if self.stage is not None else f"{model} on {where}"


def imported(
    source: Source,
    *,
    name: str,
    executed_by: str,
    measured_on: str,
    imported_from: str,
    samples: dict[str, tuple[float, ...]],
    load_ms: float | None = None,
    peak_memory_bytes: int | None = None,
    warmup: dict[str, float] | None = None,
) -> ContenderResult:
    """A contender from imported figures; those of decode are given as a rate too.

    More than six parameters: it is what `ContenderResult` says of a contender.

    Raises:
        BenchmarkError: A figure is none.
    """
    check_samples(source.path, samples, name)
    check_samples(source.path, {metric: (value,) for metric, value in (warmup or {}).items()}, name)
    if "decode_ms" in samples and "decode_tokens_per_s" not in samples:
        samples = {**samples, "decode_tokens_per_s": tuple(1e3 / ms for ms in samples["decode_ms"])}
    return ContenderResult(
        name=name,
        executed_by=executed_by,
        measured_on=measured_on,
        imported_from=imported_from,
        load_ms=load_ms,
        peak_memory_bytes=peak_memory_bytes,
        file_bytes=None,
        warmup=warmup or {},
        metrics=spreads_of(samples),
        samples=samples,
        ratio_to_reference={},
        ratio_interval={},
        energy_not_run=None if "energy_j" in samples else "the file does not tell it",
    )


def merged(one: ContenderResult, other: ContenderResult) -> ContenderResult:
    """Two parts of one answer, of different files, as one contender.

    Each part was measured in a process of its own, so nothing is known of the memory of both together.
    """
    samples = {**one.samples, **other.samples}
    loads = (one.load_ms, other.load_ms)
    return replace(
        one,
        load_ms=None if loads[0] is None or loads[1] is None else loads[0] + loads[1],
        peak_memory_bytes=None,
        metrics=spreads_of(samples),
        samples=samples,
    )
