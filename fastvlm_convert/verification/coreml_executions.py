"""Core ML runs its packages on a Mac; elsewhere, and on request beside it, the interpreter does."""

from dataclasses import replace

from fastvlm_convert.manifest import Manifest
from fastvlm_convert.runtime.core_ml import has_core_ml
from fastvlm_convert.verification.compare import LOGIT_STAGES, StageGates
from fastvlm_convert.verification.execution import Execution, full_gates, least_everywhere


def coreml_executions(manifest: Manifest, interpret: bool) -> list[Execution]:
    """Core ML itself; interpreted, once in float32 and, where float16 is declared, once rounding to it."""
    gates, recipe = manifest.recipe.gates, manifest.recipe
    declares_float16 = "float16" in (recipe.vision.compute, recipe.decoder.compute)
    exact = full_gates(gates)
    if not declares_float16 and recipe.coreml.kv_cache == "state":
        cached = dict.fromkeys(LOGIT_STAGES, gates.fp16_cache_min_sqnr_db)
        exact = replace(exact, min_sqnr_db={**exact.min_sqnr_db, **cached})
    rounded = StageGates(least_everywhere(gates.device_min_sqnr_db), False, gates.max_new_tokens)
    found = [Execution("Core ML", None, rounded)] if has_core_ml() else []
    if interpret or not found:
        found.append(Execution("coreml", "exact", exact))
        if declares_float16:
            found.append(Execution("coreml fp16", "device", rounded))
    return found
