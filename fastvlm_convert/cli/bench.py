"""`fastvlm-convert bench`: latency and memory, side by side."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.bench.run import METRICS, Contender, ContenderResult, bench
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, out, plain_table, progress, report, size_text
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.manifest import Manifest, load_manifest

EXAMPLES = """
fastvlm-convert bench app --reference FastVLM-0.5B
fastvlm-convert bench fp16 int4 --new-tokens 64 --trials 20
"""
_LABELS = {
    "vision_ms": "vision ms",
    "prefill_ms": "prefill ms",
    "ttft_ms": "first token ms",
    "prefill_tokens_per_s": "prefill tok/s",
    "decode_tokens_per_s": "decode tok/s",
}
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class HostFacts:
    """The machine that measured."""

    machine: str
    system: str
    cpu_count: int | None


@dataclass(frozen=True)
class BenchDocument(Document, name="bench"):
    """Latency and memory.

    Attributes:
        host: Where it was measured.
        new_tokens: Length of every answer.
        trials: Rounds.
        contenders: What was measured of each.
    """

    host: HostFacts
    new_tokens: int
    trials: int
    contenders: tuple[ContenderResult, ...]


def command(
    context: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Folders of bundles.", show_default=False)
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Also run this checkpoint as the PyTorch reference.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Length of every answer in tokens.")
    ] = 32,
    trials: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rounds to measure, after one to warm up.")
    ] = 10,
) -> None:
    """Measure latency and memory, side by side.

    Bundles and reference take turns, each in a process of its own, so that whatever else the machine does
    affects all alike.
    """
    manifests = {bundle: load_manifest(bundle) for bundle in bundles}
    contract = manifests[bundles[0]].contract
    contenders = _contenders(reference, manifests)
    with progress(flags_of(context).is_silent) as on_stage:
        on_stage("bench", 0.0)
        results = bench(
            contenders,
            image_size=contract.image_size,
            context_length=contract.context_length,
            new_tokens=new_tokens,
            trials=trials,
            on_progress=lambda share: on_stage("bench", share),
        )
    machine = HostFacts(platform.machine(), platform.system(), os.cpu_count())
    document = BenchDocument(machine, new_tokens, trials, tuple(results))

    def show() -> None:
        _print(results)
        err.print(
            f"\n{trials} trials of {new_tokens} tokens on this host, not a phone "
            f"({machine.system} {machine.machine}, {machine.cpu_count} CPUs).\n"
            "Cells: median (90th percentile; ratio to the reference's median).",
            soft_wrap=True,
        )

    report(context, "passed", document, show, brief="; ".join(_verdict(r) for r in results))


def _contenders(reference: Path | None, manifests: Mapping[Path, Manifest]) -> list[Contender]:
    """The reference first, then every target of every bundle."""
    contenders = []
    if reference is not None:
        weights = [p for p in open_checkpoint(reference).files if p.suffix in _WEIGHT_SUFFIXES]
        contenders.append(Contender("reference", reference, None, sum(p.stat().st_size for p in weights)))
    for bundle, manifest in manifests.items():
        for target in manifest.targets:
            files = {f for a in manifest.artifacts if a.target == target for f in a.files}
            size = sum(manifest.files[f].size for f in files)
            contenders.append(Contender(f"{bundle.resolve().name} {target}", bundle, target, size))
    return contenders


def _verdict(result: ContenderResult) -> str:
    """`app onnx: first token 69.6 ms (0.75x), decode 136 tok/s (0.92x)`."""
    shown = {}
    for metric in ("ttft_ms", "decode_tokens_per_s"):
        ratio = result.ratio_to_reference.get(metric)
        shown[metric] = _figure(result.metrics[metric].p50), "" if ratio is None else f" ({ratio:.2f}x)"
    (first, first_ratio), (decode, decode_ratio) = shown.values()
    return f"{result.name}: first token {first} ms{first_ratio}, decode {decode} tok/s{decode_ratio}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _print(results: list[ContenderResult]) -> None:
    names = [result.name for result in results]
    table = plain_table("", *names, right=names)
    for metric in METRICS:
        cells = []
        for result in results:
            spread, ratio = result.metrics[metric], result.ratio_to_reference.get(metric)
            shown = f"{_figure(spread.p50)} ({_figure(spread.p90)}"
            cells.append(f"{shown}; {ratio:.2f}x)" if ratio is not None else f"{shown})")
        table.add_row(_LABELS[metric], *cells)
    table.add_row("load ms", *(f"{r.load_ms:.0f}" for r in results))
    table.add_row("peak memory", *(size_text(r.peak_memory_bytes) for r in results))
    table.add_row("files", *(size_text(r.file_bytes) for r in results))
    table.add_row("executed by", *(r.executed_by for r in results))
    out.print(table)
