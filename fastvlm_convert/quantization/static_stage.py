"""Static activations, found once: what was found is kept in the user's cache."""

import hashlib
import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from fastvlm_convert.activation_report import ActivationReport
from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.errors import ConversionError, RecipeError
from fastvlm_convert.progress import OnShare
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.quantization.stages import ACTIVATIONS
from fastvlm_convert.quantization.static_activations import StaticActivations, static_activations
from fastvlm_convert.quantization.weight_plan import WeightPlan
from fastvlm_convert.quantized.activations import LayerScales, is_in_encoder
from fastvlm_convert.user_cache import About, about_path, save_about, touch
from fastvlm_convert.weights.source import WeightSource

_FACTS: Final = "facts"
_EXPONENTS: Final = "exponents:"
_BIAS: Final = "bias:"


def static_stage(
    plan: WeightPlan, floats: WeightSource, calibration: Calibration, on_progress: OnShare
) -> StaticActivations:
    """What makes activations integers, from the cache or from pictures.

    Args:
        plan: What happens to the weights; its recipe has integer activations.
        floats: The weights, folded and repaired.
        calibration: Questions about pictures.
        on_progress: Called with the share that is done, 0..1.

    Raises:
        RecipeError: There is no picture, or the data is not at hand.
    """
    path = ACTIVATIONS.path(_key(plan, calibration))
    known = _load(path)
    if known is not None:
        touch(about_path(path, ACTIVATIONS))
        on_progress(1.0)
        return known
    if not calibration.questions:
        raise RecipeError(
            "the ranges of activations were taken from pictures that are not at hand",
            hint="export again with the same pictures on this machine, then verify",
        )
    if not any(question.images for question in calibration.questions):
        raise RecipeError("the calibration data holds no picture", hint="add entries with an 'image'")
    found = static_activations(plan, floats, calibration, on_progress)
    _save(path, found)
    checkpoint = plan.checkpoint
    save_about(path, ACTIVATIONS, About(checkpoint.path.resolve().name, checkpoint.sha256, plan.recipe.name))
    return found


def _key(plan: WeightPlan, calibration: Calibration) -> str:
    layers = [(p.layer, p.shape, p.scheme, p.solver) for p in plan.layers if is_in_encoder(p.layer)]
    asked = (plan.checkpoint.sha256, calibration.sha256, plan.images, plan.recipe.vision.activations)
    return hashlib.sha256(repr((*asked, layers)).encode()).hexdigest()


def _save(path: Path, found: StaticActivations) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scales = {name: asdict(scale) for name, scale in found.scales.items()}
    facts = json.dumps({"scales": scales, "report": asdict(found.report)}, allow_nan=False)
    arrays: dict[str, Any] = {_FACTS: np.frombuffer(facts.encode(), np.uint8)}
    arrays |= {f"{_EXPONENTS}{name}": array for name, array in found.exponents.items()}
    arrays |= {f"{_BIAS}{name}": array for name, array in found.biases.items()}
    with whole_file(path) as partial:
        np.savez(partial, **arrays)


def _load(path: Path) -> StaticActivations | None:
    """What was saved; None where there is nothing, or it is damaged."""
    try:
        with np.load(path) as arrays:
            facts = json.loads(arrays[_FACTS].tobytes())
            return StaticActivations(
                {n.removeprefix(_EXPONENTS): arrays[n] for n in arrays if n.startswith(_EXPONENTS)},
                {name: from_plain(LayerScales, value) for name, value in facts["scales"].items()},
                {n.removeprefix(_BIAS): arrays[n] for n in arrays if n.startswith(_BIAS)},
                from_plain(ActivationReport, facts["report"]),
            )
    # A cache that cannot be read is no cache.
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, ConversionError):
        return None
