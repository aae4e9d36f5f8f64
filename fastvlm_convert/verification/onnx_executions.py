"""ONNX Runtime runs ONNX."""

from dataclasses import replace

from fastvlm_convert.manifest import Manifest
from fastvlm_convert.verification.compare import LOGIT_STAGES
from fastvlm_convert.verification.execution import Execution, full_gates

_EXACT_TOKENS = 4  # 8-bit matrices without int8 activations run hundreds of times slower


def onnx_executions(manifest: Manifest, interpret: bool) -> list[Execution]:
    """The graphs as they are shipped; quantized ones once more without rounding activations.

    As shipped, MatMulNBits rounds activations to int8; without that, the lowering must be exact.
    """
    del interpret
    recipe = manifest.recipe
    full = full_gates(recipe)
    if not recipe.quantize:
        return [Execution("onnx", None, full)]
    front = {stage: least for stage, least in full.min_sqnr_db.items() if stage not in LOGIT_STAGES}
    shipped = replace(full, min_sqnr_db=front, identical_text=False)
    exact = replace(full, identical_text=False, max_new_tokens=_EXACT_TOKENS)
    return [Execution("onnx", None, shipped), Execution("onnx exact", "exact", exact, max_questions=1)]
