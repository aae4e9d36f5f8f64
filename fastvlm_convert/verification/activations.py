"""Would float16 overflow? What the reference computes, against the range of what a recipe rounds.

A processor may compute float16 operators in float32 inside, as ONNX Runtime does on x86, and hide an overflow
that a phone has. So the sizes are taken from the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fastvlm_convert.exporters.backends import backend_of, decoder_settings
from fastvlm_convert.float16.repairs import rounded
from fastvlm_convert.float16.report import MIN_HEADROOM, RangeReport
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.targets import Target
from fastvlm_convert.verification.check import Check, at_most
from fastvlm_convert.verification.reference_run import ReferenceRun
from fastvlm_convert.weights.storage import FLOAT16_MAX

if TYPE_CHECKING:  # torch, which the model has loaded when this is called
    from fastvlm_convert.model.fastvlm import FastVLM

_QUESTIONS = 4
_FED_TOKENS = 15
_SHOWN = 3


@dataclass(frozen=True)
class Activations:
    """What was found.

    Attributes:
        checks: One.
        warnings: What fits, but barely.
    """

    checks: tuple[Check, ...]
    warnings: tuple[str, ...]


def uses_float16(recipe: Recipe, targets: Sequence[Target]) -> bool:
    """Whether a recipe rounds any activation to float16."""
    cached = any(backend_of(target).has_float16_cache(recipe) for target in targets)
    computed = {decoder_settings(recipe, target).compute for target in targets}
    return cached or "float16" in {recipe.vision.compute, *computed}


def check_activations(
    model: LoadedModel,
    recipe: Recipe,
    targets: Sequence[Target],
    runs: Sequence[ReferenceRun],
    on_progress: OnShare = ignore_share,
) -> Activations:
    """Record the largest activations on some of the questions.

    A prompt and its answer are read in one pass; pictures are encoded again only if that rounds to float16.

    Args:
        model: The reference with weights that are repaired as the recipe says.
        recipe: Its precisions.
        targets: Where it is to run.
        runs: What the reference makes of the questions.
        on_progress: Called with the share of the questions done, 0..1.

    Raises:
        CheckpointError: The reference itself gives NaN or infinity.
    """
    from fastvlm_convert.float16.scan import recorded

    session, some = model.session, runs[:_QUESTIONS]
    network: FastVLM = session.model  # type: ignore[attr-defined]  # it is a TorchSession
    with recorded(network) as ranges:
        for number, run in enumerate(some):
            for image in run.prompt.images if recipe.vision.compute == "float16" else ():
                session.encode_image(image)
            said = session.embed(np.asarray(run.fed[:_FED_TOKENS], np.int64))
            session.prefill(np.concatenate([run.embeds, said]))
            on_progress((number + 1) / len(some))
    report = RangeReport("", len(some), ranges())
    # The model's weights have had these two.
    left = replace(recipe, repairs=replace(recipe.repairs, residual_shift=0, rescaled_keys=()))
    found = rounded(report, left, targets)
    if not found:
        return Activations((), ())
    worst, by = found[0], session.executed_by
    check = at_most("bundle", "activations", "max_abs", worst.max_abs, FLOAT16_MAX, by)
    risky = [f"{o.op} ({o.max_abs:.0f})" for o in found if o.headroom < MIN_HEADROOM]
    named = ", ".join(risky[:_SHOWN]) + (f" and {len(risky) - _SHOWN} more" if len(risky) > _SHOWN else "")
    advice = (
        f"`fastvlm-convert scan CHECKPOINT --recipe {recipe.name} -o FILE.yaml` writes a recipe with repairs"
    )
    if check.status == "failed":
        reason = f"in the reference, {named} overflow float16 or nearly do; {advice}"
        return Activations((replace(check, reason=reason),), ())
    if risky:
        warning = f"less than {MIN_HEADROOM:.0f}x headroom to float16's limit at {named}; {advice}"
        return Activations((check,), (warning,))
    return Activations((check,), ())
