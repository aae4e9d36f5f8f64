"""Signal to noise of the image tokens with the encoder and projector at int8, per output channel.

    python -m benchmarks.encoder_int8 CHECKPOINT...

Compares what coremltools' `linear_quantize_weights` computes, our search (recipe int8) and our GPTQ, on the
same layers and on held-out pictures of the demo generator, clean and badly taken. Limit: 3 dB above
coremltools.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.quantize_answers import CALIBRATION, DEGRADED_SEED, FLOAT, fixed, pictures, through
from benchmarks.quantize_layers import coreml_numerics
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.demo.samples import HELD_OUT_SEED
from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.preprocess import pixel_values
from fastvlm_convert.quantization.prepared_weights import calibration_for, prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import WeightSource

PICTURES = 32
ENCODER = ("vision.*", "projector.*")
MATRICES = ("vision.*.fc1", "vision.*.fc2", "vision.*.qkv", "vision.*.proj", "vision.stages.*.downsample.1",
            "projector.*")  # fmt: skip


def coremltools_int8(weights: WeightSource) -> WeightSource:
    """The encoder's matrices and convolutions rounded as coremltools does it, with float16 scales."""
    changed = dict(weights)
    for name, weight in weights.items():
        if name.startswith(("vision.", "projector.")) and name.endswith(".weight") and len(weight.shape) > 1:
            values = weight.array()
            blocks = [1] + [0] * (values.ndim - 1)
            q, scale, _ = coreml_numerics.compute_qparams(
                values, 8, True, "LINEAR_SYMMETRIC", np.int8, blocks
            )
            stored = scale.astype(np.float16).astype(np.float32)
            changed[name] = fixed(q.astype(np.float32) * stored)
    return changed


@torch.no_grad()
def image_tokens(checkpoint: Checkpoint, weights: WeightSource, pixels: torch.Tensor) -> np.ndarray:
    """float32 [pictures, tokens, hidden]."""
    chain = BlockStreamer(checkpoint.config, weights)
    return through(chain, [chain.load(block) for block in chain.vision_blocks()], pixels).numpy()


def main() -> None:
    """Print one row per method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rules = {
        "search": (QuantizeRule(ENCODER, "int8"), FLOAT),
        "GPTQ": (
            QuantizeRule(MATRICES, "int8", solver="gptq"), QuantizeRule(ENCODER, "int8"), FLOAT,
        ),
    }  # fmt: skip
    for path in arguments.checkpoints:
        checkpoint = open_checkpoint(path)
        weights = fold(checkpoint.weights)
        shown = [
            image
            for first, bad in ((HELD_OUT_SEED, False), (DEGRADED_SEED, True))
            for image, _ in pictures(first, PICTURES, bad)
        ]
        settings = checkpoint.pictures.image
        pixels = torch.from_numpy(np.concatenate([pixel_values(image, settings) for image in shown]))
        reference = image_tokens(checkpoint, weights, pixels)
        ways = {"coremltools": coremltools_int8(weights)}
        for name, rule in rules.items():
            recipe = replace(load_recipe("int8"), quantize=rule, calibration=CALIBRATION)
            plan = plan_weights(checkpoint, recipe)
            ways[name] = dense_view(prepare_weights(plan, calibration_for(plan, None)).weights)
        for name, changed in ways.items():
            value = sqnr_db(reference, image_tokens(checkpoint, changed, pixels))
            print(f"{path.name:16} {name:16} {value:6.1f} dB", flush=True)


if __name__ == "__main__":
    main()
