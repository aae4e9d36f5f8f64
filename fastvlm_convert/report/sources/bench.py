"""What `bench --json` measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.amounts import count_text
from fastvlm_convert.report.figures.latency import Bar, Panel
from fastvlm_convert.report.sources.documents import Fields, read_document

_VERSIONS: Final = (1,)
_TITLES: Final = {  # in the order in which a person waits
    "ttft_ms": "First token, ms",
    "end_to_end_ms": "Whole answer, ms",
    "vision_ms": "Picture encoder, ms",
    "prefill_ms": "Prefill, ms",
    "decode_tokens_per_s": "Decoding, tokens/s",
    "run_ms": "One run of the graph, ms",
    "energy_j": "Energy of an answer, J",
}
_RATE: Final = "_per_s"
_REFERENCE: Final = "reference"


@dataclass(frozen=True)
class Contender:
    """What was measured of one contender.

    Attributes:
        name: Its name.
        executed_by: What executed it, and where if that was another machine.
        is_reference: Whether the others are compared with it.
        medians: By metric.
        ratios: To the reference, by metric.
        intervals: Where these ratios lie, by metric.
        peak_memory_bytes: Most memory its process had, or None.
        load_ms: Time to load it, or None.
    """

    name: str
    executed_by: str
    is_reference: bool
    medians: Mapping[str, float]
    ratios: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    peak_memory_bytes: float | None
    load_ms: float | None


@dataclass(frozen=True)
class Bench:
    """A measurement.

    Attributes:
        method: What was measured and where, in a sentence.
        notes: What to know with it.
        contenders: What was measured.
        panels: The same with spreads, by metric.
        titles: What the metrics are called.
    """

    method: str
    notes: tuple[str, ...]
    contenders: tuple[Contender, ...]
    panels: tuple[Panel, ...]
    titles: Mapping[str, str]


def read_bench(path: Path) -> Bench:
    """The document of `bench --json`.

    Raises:
        BundleError: It cannot be read or is malformed.
    """
    document = read_document(path, "bench", _VERSIONS)
    results = document.objects("contenders")
    titles = {
        metric: title
        for metric, title in _TITLES.items()
        if any(metric in result.object("metrics") for result in results)
    }
    return Bench(
        method=_method(document),
        notes=document.texts("notes") if "notes" in document else (),
        contenders=tuple(map(_contender, results)),
        panels=tuple(_panel(metric, title, results) for metric, title in titles.items()),
        titles=titles,
    )


def _method(document: Fields) -> str:
    """`10 trials of 32 tokens on Intel Xeon, 2 cores`, in the words of the document."""
    settings = document.optional_object("settings") or document
    trials = f"{count_text(settings.count('trials'), 'trial')} of {settings.count('new_tokens')} tokens"
    if "trials" not in settings:
        return "Figures of other machines, imported"
    machine = document.optional_object("machine")
    if machine is not None:
        return f"{trials} on {machine.text('cpu')}, {machine.count('cores')} cores, {machine.text('os')}"
    host = document.object("host")
    return f"{trials} on {host.text('system')} {host.text('machine')}, {host.count('cpu_count')} CPUs"


def _contender(result: Fields) -> Contender:
    metrics = result.object("metrics")
    ratios = result.object("ratio_to_reference")
    given = result.optional_object("ratio_interval")
    intervals = {} if given is None else {metric: _ends(given.object(metric)) for metric in given}
    name, by = result.text("name"), result.text("executed_by")
    elsewhere = result.text("measured_on") if "imported_from" in result else None
    return Contender(
        name=name,
        executed_by=by if elsewhere is None else f"{by} on {elsewhere}",
        is_reference=name == _REFERENCE,
        medians={metric: metrics.object(metric).number("p50") for metric in metrics},
        ratios={metric: ratios.number(metric) for metric in ratios},
        intervals=intervals,
        peak_memory_bytes=result.optional_number("peak_memory_bytes"),
        load_ms=result.optional_number("load_ms"),
    )


def _ends(interval: Fields) -> tuple[float, float]:
    return interval.number("low"), interval.number("high")


def _panel(metric: str, title: str, results: list[Fields]) -> Panel:
    """A metric of every contender that has it; the spread goes from the best to the 90th percentile."""
    is_rate = metric.endswith(_RATE)
    bars = []
    for result in results:
        spread = result.object("metrics").optional_object(metric)
        if spread is not None:
            best = spread.number("max" if is_rate else "min")
            low, high = sorted((best, spread.number("p90")))
            name = result.text("name")
            bars.append(Bar(name, low, spread.number("p50"), high, name == _REFERENCE))
    return Panel(title, "higher" if is_rate else "lower", tuple(bars))
