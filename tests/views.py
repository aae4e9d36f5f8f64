"""Every way in which weights are seen; run as a program it prints a hash over all of them.

It imports no large library, so that a test can start it several times.
"""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.exporters.rotary import rotary_tables
from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.recipe_settings import QuantizeRule, RepairSettings
from fastvlm_convert.weights.fold import fold, scaled_columns
from fastvlm_convert.weights.published import published_config
from fastvlm_convert.weights.rescale import fp16_safe
from fastvlm_convert.weights.source import Weight, reshaped

INTEGERS = (
    QuantizeRule(("decoder.layers.0.*",), "int4", 16, symmetric=False),
    QuantizeRule(("decoder.*",), "int4", 16),
    QuantizeRule(("*",), "int8"),
)
PALETTES = (
    QuantizeRule(("decoder.embed_tokens",), "palette4", channel_scale=True, group_size=8),
    QuantizeRule(("decoder.layers.0.*",), "palette6"),
    QuantizeRule(("vision.stages.4.*", "decoder.*"), "palette4"),
    QuantizeRule(("*",), "float"),
)


def all_views(checkpoint: Path, adapter: Path) -> dict[str, Weight]:
    """Every weight of a checkpoint with every view there is, by a name that says which."""
    opened = open_checkpoint(checkpoint, adapter)
    folded, decoder = fold(opened.weights), opened.config.decoder
    repairs = RepairSettings(residual_shift=3, rescaled_keys=tuple(range(decoder.num_layers)))
    kinds = {
        "stored": {n: w for n, w in opened.stored.items() if w.shape},
        "merged": opened.weights,
        "folded": folded,
        "repaired": fp16_safe(folded, decoder, repairs),
    }
    for kind, rules in (("integers", INTEGERS), ("palettes", PALETTES)):
        recipe = replace(load_recipe("int4"), quantize=rules)
        plans = plan_layers({n: w.shape for n, w in folded.items()}, recipe)
        kinds[kind] = dense_view(quantize_weights(folded, plans))
    down = folded["decoder.layers.0.mlp.down_proj.weight"]
    rows, columns = down.shape
    factors = np.linspace(0.1, 3, columns, dtype=np.float32)
    kinds["others"] = {
        "columns": scaled_columns(down, lambda: factors),
        "reshaped": reshaped(down, (rows, 2, columns // 2)),
    }
    return {f"{kind} {name}": weight for kind, view in kinds.items() for name, weight in view.items()}


def digest(checkpoint: Path, adapter: Path) -> str:
    """A hash over all views of a checkpoint, and rotary tables of real models."""
    total = hashlib.sha256()
    for name, weight in sorted(all_views(checkpoint, adapter).items()):
        total.update(name.encode() + weight.array().tobytes())
    for size in ("0.5b", "7b"):
        for table in rotary_tables(published_config(size).decoder, 20_000):
            total.update(table.tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    sys.stdout.write(digest(Path(sys.argv[1]), Path(sys.argv[2])))
