"""How each target of a bundle is executed on this machine, and what each execution must reach."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.manifest import Manifest, Target
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.runtime.loaded import LoadedModel, has_core_ml, load_bundle
from fastvlm_convert.verification.compare import NUMERIC_STAGES, StageGates

Load = Callable[[Path, Manifest], LoadedModel]

_LOGITS = ("prefill_logits", "decode_logits")
_EXACT_TOKENS = 4  # 8-bit matrices without int8 activations run hundreds of times slower


@dataclass(frozen=True)
class Execution:
    """One way to run a target.

    Attributes:
        name: For progress.
        load: Loads the bundle for it.
        gates: What it must reach.
        max_questions: How many questions it is asked; None for all. Some executions are very slow.
    """

    name: str
    load: Load
    gates: StageGates
    max_questions: int | None = None


def executions(manifest: Manifest, target: Target, interpret: bool) -> list[Execution]:
    """How to execute a target here.

    ONNX Runtime runs ONNX. Core ML runs its packages on a Mac; elsewhere, and on request beside it, the
    interpreter does, once computing in float32 and, where the program declares float16, once rounding to it.

    Args:
        manifest: The bundle's.
        target: The target.
        interpret: Whether to interpret Core ML packages on a Mac, too.
    """
    gates, recipe = manifest.recipe.gates, manifest.recipe
    full = dict.fromkeys(NUMERIC_STAGES, gates.min_sqnr_db)
    if target == "onnx":
        return _onnx_executions(recipe, full)
    declares_float16 = "float16" in (recipe.vision.compute, recipe.decoder.compute)
    if not declares_float16 and recipe.coreml.kv_cache == "state":
        full |= dict.fromkeys(_LOGITS, gates.fp16_cache_min_sqnr_db)
    exact = StageGates(full, gates.identical_text, gates.max_new_tokens)
    rounded = StageGates(dict.fromkeys(NUMERIC_STAGES, gates.device_min_sqnr_db), False, gates.max_new_tokens)
    found = []
    if has_core_ml():
        found.append(Execution("Core ML", lambda b, m: load_bundle(b, m, "coreml"), rounded))
    if interpret or not found:
        found.append(Execution("coreml", lambda b, m: load_bundle(b, m, "coreml", "exact"), exact))
        if declares_float16:
            found.append(
                Execution("coreml fp16", lambda b, m: load_bundle(b, m, "coreml", "device"), rounded)
            )
    return found


def _onnx_executions(recipe: Recipe, full: dict[str, float]) -> list[Execution]:
    gates = recipe.gates
    if not recipe.quantize:
        stages = StageGates(full, gates.identical_text, gates.max_new_tokens)
        return [Execution("onnx", lambda b, m: load_bundle(b, m, "onnx"), stages)]
    # As shipped, MatMulNBits rounds activations to int8; without that, the lowering must be exact.
    front = {stage: least for stage, least in full.items() if stage not in _LOGITS}
    shipped = StageGates(front, False, gates.max_new_tokens, gates.runtime_max_kl_nats)
    exact = StageGates(full, False, _EXACT_TOKENS)
    return [
        Execution("onnx", lambda b, m: load_bundle(b, m, "onnx"), shipped),
        Execution("onnx exact", lambda b, m: load_bundle(b, m, "onnx", "exact"), exact, max_questions=1),
    ]
