"""`fastvlm-convert bench`: latency and memory, side by side."""

import dataclasses
import os
import platform
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.bench.run import METRICS, Contender, ContenderResult, bench
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, out, print_json, progress, size_text
from fastvlm_convert.cli.options import JsonOption, VerboseOption
from fastvlm_convert.manifest import load_manifest

_LABELS = {
    "vision_ms": "vision ms",
    "prefill_ms": "prefill ms",
    "ttft_ms": "first token ms",
    "prefill_tokens_per_s": "prefill tok/s",
    "decode_tokens_per_s": "decode tok/s",
}
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


def command(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Folders of bundles.", show_default=False)
    ],
    reference: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Also run its PyTorch reference.", show_default=False),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of every answer.")] = 32,
    trials: Annotated[int, typer.Option(min=1, help="Measured rounds, after one to warm up.")] = 10,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure the reference and bundles, interleaved in one run, each in a process of its own."""
    manifests = {bundle: load_manifest(bundle) for bundle in bundles}
    contract = manifests[bundles[0]].contract
    contenders = []
    if reference is not None:
        opened = open_checkpoint(reference)
        weights = [p for p in opened.files if p.suffix in _WEIGHT_SUFFIXES]
        contenders.append(Contender("reference", reference, None, sum(p.stat().st_size for p in weights)))
    for bundle, manifest in manifests.items():
        for target in manifest.targets:
            files = {f for a in manifest.artifacts if a.target == target for f in a.files}
            size = sum(manifest.files[f].size for f in files)
            contenders.append(Contender(f"{bundle.resolve().name} {target}", bundle, target, size))
    with progress(quiet=as_json) as on_stage:
        on_stage("bench", 0.0)
        results = bench(
            contenders,
            image_size=contract.image_size,
            context_length=contract.context_length,
            new_tokens=new_tokens,
            trials=trials,
            on_progress=lambda share: on_stage("bench", share),
        )
    machine = {"machine": platform.machine(), "system": platform.system(), "cpu_count": os.cpu_count()}
    if as_json:
        print_json(
            "bench",
            "passed",
            host=machine,
            new_tokens=new_tokens,
            trials=trials,
            contenders=[dataclasses.asdict(result) for result in results],
        )
        return
    _print(results)
    err.print(
        f"{trials} trials of {new_tokens} tokens on {machine['system']} {machine['machine']}, "
        f"{machine['cpu_count']} CPUs: this is the host, not a phone. "
        "Median (p90; x: median over the reference's).",
        soft_wrap=True,
    )


def _print(results: list[ContenderResult]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for result in results:
        table.add_column(escape(result.name), justify="right")
    for metric in METRICS:
        cells = []
        for result in results:
            spread, ratio = result.metrics[metric], result.ratio_to_reference.get(metric)
            shown = f"{spread.p50:.1f} ({spread.p90:.1f}"
            cells.append(f"{shown}; {ratio:.2f}x)" if ratio is not None else f"{shown})")
        table.add_row(_LABELS[metric], *cells)
    table.add_row("load ms", *(f"{r.load_ms:.0f}" for r in results))
    table.add_row("peak memory", *(size_text(r.peak_memory_bytes) for r in results))
    table.add_row("files", *(size_text(r.file_bytes) for r in results))
    table.add_row("executed by", *(r.executed_by for r in results))
    out.print(table)
