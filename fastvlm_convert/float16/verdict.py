"""What the scan of a checkpoint, if there was one, says of an export."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, source_hash
from fastvlm_convert.float16.repairs import at_risk, missing_repairs, needed_repairs, settings_of
from fastvlm_convert.float16.report import MIN_HEADROOM, RangeReport, load_report
from fastvlm_convert.manifest import Status
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.targets import Target


@dataclass(frozen=True)
class Verdict:
    """Whether activations stay within float16's range.

    Attributes:
        status: `not_run` where the checkpoint was never scanned.
        warnings: What to do about operations at risk.
    """

    status: Status
    warnings: tuple[str, ...]


def judge(checkpoint: Checkpoint, recipe: Recipe, targets: Sequence[Target]) -> Verdict:
    """Hold a recipe against the scan of this very checkpoint.

    Args:
        checkpoint: The checkpoint; a quantized one is judged by its own scan, or else by the float one's.
        recipe: Its precisions and repairs.
        targets: Where it is to run.
    """
    own = None if checkpoint.quantized is None else load_report(checkpoint.sha256)
    scan = own or load_report(source_hash(checkpoint))
    if scan is None:
        return Verdict("not_run", ())
    status: Status = "failed" if at_risk(scan, recipe, targets) else "passed"
    return Verdict(status, tuple(_warnings(scan, recipe, targets)))


def _warnings(scan: RangeReport, recipe: Recipe, targets: Sequence[Target]) -> list[str]:
    warnings: list[str] = []
    if missing := missing_repairs(scan, recipe, targets):
        warnings.append(
            f"the range scan asks for repairs that recipe '{recipe.name}' lacks: "
            + "; ".join(f"{repair.setting} ({repair.reason})" for repair in missing)
            + f"; `fastvlm-convert scan CHECKPOINT --recipe {recipe.name} -o FILE` writes a recipe with them"
        )
    repaired = replace(recipe, repairs=settings_of(needed_repairs(scan, recipe, targets)))
    if left := at_risk(scan, repaired, targets):
        warnings.append(
            f"the range scan found less than {MIN_HEADROOM:.0f}x headroom to float16's limit at "
            f"{', '.join(op.op for op in left)}; keep them in float32 (float32_ops in the recipe)"
        )
    return warnings
