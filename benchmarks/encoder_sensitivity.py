"""What 4 bits in a single part of the encoder cost the answers; why int4-mixed keeps some parts at 8 bits.

    python -m benchmarks.encoder_sensitivity [CHECKPOINT] [--pictures 50]

Rounded by GPTQ in blocks of 32; mean KL divergence over badly taken held-out pictures, in nats.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.quantize_answers import CALIBRATION, DEGRADED_SEED, FLOAT, ask, logits_of, pictures
from fastvlm_convert import metrics
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.quantization.calibration import read_calibration
from fastvlm_convert.quantization.prepared_weights import prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import WeightSource

DEMO = Path(__file__).parent.parent / "checkpoints" / "fastvlm-demo"
PARTS = {"fc1": "ffn", "fc2": "ffn", "qkv": "attention", "proj": "attention"}


def parts(weights: WeightSource) -> Iterator[tuple[str, list[str]]]:
    """The encoder's linears and 1x1 convolutions, by stage and kind."""
    found: dict[str, list[str]] = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if not name.startswith("vision.") or layer == name or len(weight.shape) < 2:
            continue
        if weight.shape[2:] not in ((), (1, 1)):
            continue
        stage = re.match(r"vision\.stages\.(\d)", layer)
        kind = PARTS.get(layer.rpartition(".")[2], "downsampling")
        part = layer.split(".")[1] if stage is None else f"stage {stage[1]}, {kind}"
        found.setdefault(part.replace("final", "squeeze-excitation"), []).append(layer)
    yield from found.items()


def main() -> None:
    """Print one row per part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--pictures", type=int, default=50)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    weights = fold(checkpoint.weights)
    test = ask(checkpoint, pictures(DEGRADED_SEED, 3 * arguments.pictures, bad=True))
    data = read_calibration(None, CALIBRATION, checkpoint.tokenizer)
    print("| part | layers | weights | KL |\n|---|---|---|---|")
    for part, layers in parts(weights):
        rule = QuantizeRule(tuple(layers), "int4", 32, symmetric=False, solver="gptq")
        recipe = replace(load_recipe("int4"), quantize=(rule, FLOAT), calibration=CALIBRATION)
        changed = dense_view(prepare_weights(plan_weights(checkpoint, recipe), data).weights)
        divergence = metrics.kl_divergence(test.logits, logits_of(checkpoint, changed, test)).mean()
        size = sum(weights[f"{layer}.weight"].size for layer in layers)
        print(f"| {part} | {len(layers)} | {size} | {divergence:.2g} |", flush=True)


if __name__ == "__main__":
    main()
