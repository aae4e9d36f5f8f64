"""MLX runs its weights, on a Mac's GPU or on any processor; mlx-vlm computes the same with them."""

from fastvlm_convert.exporters.backends import decoder_settings
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.verification.compare import StageGates
from fastvlm_convert.verification.execution import Execution, full_gates, least_everywhere, most_kl_nats


def mlx_executions(manifest: Manifest, interpret: bool) -> list[Execution]:
    """As it is shipped; where float16 rounds, once more in float32, where the lowering must be exact."""
    del interpret
    recipe = manifest.recipe
    full = full_gates(recipe)
    settings = (recipe.vision, decoder_settings(recipe, "mlx"))
    if not recipe.quantize and all(part.storage == part.compute == "float32" for part in settings):
        return [Execution("mlx", None, full)]
    least = least_everywhere(recipe.gates.device_min_sqnr_db)
    rounded = StageGates(least, False, recipe.gates.max_new_tokens, most_kl_nats(recipe))
    return [Execution("mlx", None, rounded), Execution("mlx exact", "exact", full)]
