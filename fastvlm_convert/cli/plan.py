"""`fastvlm-convert plan`: what an export will do, write and need; reads config and headers alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.amounts import size_text
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.cli.console import err, out, plain_table, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import (
    AdapterOption,
    CheckpointArgument,
    MaxMemoryOption,
    ProjectorOption,
    StoredRecipeOption,
    TargetOption,
    VisionTowerOption,
    chosen_targets,
)
from fastvlm_convert.cli.store_texts import FitFacts, fit_facts, fit_text
from fastvlm_convert.exporters.backends import decoder_settings
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.pipeline import PlanResult, plan
from fastvlm_convert.predict.memory import StageNeed
from fastvlm_convert.quantized.layer_groups import LayerGroup, group_layers
from fastvlm_convert.quantized.layer_report import scheme_text
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.recipe_settings import Solver
from fastvlm_convert.targets import Target
from fastvlm_convert.weights.file_tensors import item_size
from fastvlm_convert.weights.parts import Part

EXAMPLES = """
fastvlm-convert plan FastVLM-0.5B --target coreml --recipe ios-int4
fastvlm-convert plan FastVLM-0.5B --target onnx --target coreml --recipe int4
"""
CONTEXT_LENGTHS: Final = (1024, 2048, 4096)


@dataclass(frozen=True)
class GroupFacts:
    """Layers of one kind that are stored the same way.

    Attributes:
        component: The part of the model that they belong to.
        layers: Kind of the layers.
        num_layers: How many.
        num_weights: Weights of all of them.
        scheme: How they are stored; None in float.
        solver: What finds their integers; None in float.
        reason: Why they stay in float, or have smaller blocks or groups than their rule says; else None.
        bytes_before: In the checkpoint.
        bytes_after: In a bundle.
        bits_per_weight: The same by weight.
    """

    component: Part
    layers: str
    num_layers: int
    num_weights: int
    scheme: str | None
    solver: Solver | None
    reason: str | None
    bytes_before: int
    bytes_after: int
    bits_per_weight: float


@dataclass(frozen=True)
class PlanDocument(Document, name="plan"):
    """What an export would do, write and need.

    Attributes:
        checkpoint: The checkpoint's folder.
        recipe: Name of the recipe.
        targets: What is exported.
        groups: The layers.
        num_weights: Of all of them.
        bits_per_weight: Of all of them.
        files: Bytes of every file but the manifest.
        total_bytes: Of all of them.
        decoder_compute: What the decoder computes in, by target.
        kv_cache_bytes: By target and tokens.
        context_length: Tokens that the recipe asks for.
        peak_memory_bytes: What the export needs, estimated.
        stages: What its stages need.
        needs_data: Whether a solver needs data.
        notes: What the user should know.
        stores: Whether the bundle fits them.
    """

    checkpoint: str
    recipe: str
    targets: tuple[Target, ...]
    groups: tuple[GroupFacts, ...]
    num_weights: int
    bits_per_weight: float
    files: dict[str, int]
    total_bytes: int
    decoder_compute: dict[Target, FloatName]
    kv_cache_bytes: dict[Target, dict[str, int]]
    context_length: int
    peak_memory_bytes: int
    stages: tuple[StageNeed, ...]
    needs_data: bool
    notes: tuple[str, ...]
    stores: tuple[FitFacts, ...]


def command(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    target: TargetOption,
    recipe: StoredRecipeOption = None,
    adapter: AdapterOption = None,
    projector: ProjectorOption = None,
    vision_tower: VisionTowerOption = None,
    max_memory: MaxMemoryOption = None,
) -> None:
    """Predict an export: layers, file sizes and memory.

    Reads headers only, and refuses what `export` would refuse.
    """
    targets = chosen_targets(target)
    settings = None if recipe is None else load_recipe(recipe)
    result = plan(
        open_checkpoint(checkpoint, adapter, projector=projector, vision_tower=vision_tower),
        recipe=settings,
        targets=targets,
        max_memory=max_memory,
    )
    facts = describe(result)
    report(context, "passed", facts, lambda: _print(facts, result, flags_of(context).quiet))


def describe(result: PlanResult) -> PlanDocument:
    """Everything `plan` knows."""
    planned = result.plan
    checkpoint, layers = planned.checkpoint, planned.layers
    context_length = planned.recipe.common.max_context_length
    before = _stored_bytes(checkpoint)
    contexts = sorted({*CONTEXT_LENGTHS, context_length})
    num_weights, stored_bits = sum(p.size for p in layers), sum(p.stored_bits for p in layers)
    is_tied = planned.config.decoder.tied
    return PlanDocument(
        checkpoint=str(checkpoint.path),
        recipe=planned.recipe.name,
        targets=tuple(planned.targets),
        groups=tuple(_group_facts(group, is_tied, before) for group in group_layers(layers)),
        num_weights=num_weights,
        bits_per_weight=stored_bits / num_weights,
        files=dict(result.files),
        total_bytes=result.total_bytes,
        decoder_compute={
            target: decoder_settings(planned.recipe, target).compute for target in planned.targets
        },
        kv_cache_bytes={
            target: {str(n): result.kv_cache_bytes(target, n) for n in contexts} for target in planned.targets
        },
        context_length=context_length,
        peak_memory_bytes=result.peak_memory_bytes,
        stages=result.stages,
        needs_data=planned.is_calibrated,
        notes=tuple(result.notes),
        stores=tuple(fit_facts(fit) for fit in result.stores),
    )


def _group_facts(group: LayerGroup, tied: bool, before: Mapping[str, int]) -> GroupFacts:
    is_shared = group.component == "embedding" and tied
    return GroupFacts(
        component=group.component,
        layers=f"{group.kind} (also the head)" if is_shared else group.kind,
        num_layers=len(group.plans),
        num_weights=group.num_weights,
        scheme=None if group.scheme is None else scheme_text(group.scheme),
        solver=group.solver,
        reason=group.reason,
        bytes_before=sum(before[plan.layer] for plan in group.plans),
        bytes_after=-(-group.stored_bits // 8),
        bits_per_weight=group.stored_bits / group.num_weights,
    )


def _stored_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of every layer's weight in the checkpoint; of a quantized one its integers, scales and tables."""
    if checkpoint.quantized is None:
        return {
            name.removesuffix(".weight"): weight.size * item_size(weight.dtype)
            for name, weight in checkpoint.weights.items()
            if name.endswith(".weight")
        }
    total: Counter[str] = Counter()
    for name, tensor in checkpoint.stored.items():
        layer, is_weight, _ = name.partition(".weight")
        total[layer] += tensor.size * item_size(tensor.dtype) if is_weight else 0
    return total


def _print(facts: PlanDocument, result: PlanResult, quiet: bool) -> None:
    for table in (_groups_table(facts), _files_table(facts), _cache_table(facts), _stages_table(facts)):
        out.print(table)
        out.print()
    out.print(
        f"{facts.bits_per_weight:.2f} bits per weight over {facts.num_weights / 1e6:.2f} M weights; "
        f"the conversion needs about {size_text(facts.peak_memory_bytes)} of memory",
        soft_wrap=True,
    )
    for fit in result.stores:
        out.print(fit_text(fit), soft_wrap=True)
    for note in () if quiet else facts.notes:
        err.print(escape(note), soft_wrap=True)


def _groups_table(facts: PlanDocument) -> Table:
    numbers = ("count", "before", "after", "bits")
    table = plain_table(
        "layers",
        "count",
        "stored as",
        "solver",
        "before",
        "after",
        "bits",
        right=numbers,
        wrap=("stored as",),
    )
    last = None
    for group in facts.groups:
        if group.component != last:
            table.add_row(f"[bold]{group.component}[/]")
        stored = group.scheme or f"float{group.bits_per_weight:.0f}"
        if group.reason:
            stored += f": {group.reason}"
        table.add_row(
            f"  {group.layers}",
            str(group.num_layers),
            escape(stored),
            group.solver or "",
            size_text(group.bytes_before),
            size_text(group.bytes_after),
            f"{group.bits_per_weight:.2f}",
        )
        last = group.component
    return table


def _files_table(facts: PlanDocument) -> Table:
    table = plain_table("file", "size", right=("size",))
    for name, size in facts.files.items():
        table.add_row(escape(name), size_text(size))
    table.add_row("[bold]total[/] without the manifest", f"[bold]{size_text(facts.total_bytes)}[/]")
    return table


def _cache_table(facts: PlanDocument) -> Table:
    caches = facts.kv_cache_bytes
    own = facts.context_length
    contexts = [f"{n} tokens{' (recipe)' if int(n) == own else ''}" for n in next(iter(caches.values()))]
    table = plain_table("KV cache", *contexts, "decoder computes in", right=contexts)
    for target, sizes in caches.items():
        table.add_row(target, *(size_text(size) for size in sizes.values()), facts.decoder_compute[target])
    return table


def _stages_table(facts: PlanDocument) -> Table:
    table = plain_table("stage of the export", "memory", right=("memory",))
    for need in facts.stages:
        table.add_row(need.stage, f"about {size_text(need.peak_memory_bytes)}")
    return table
