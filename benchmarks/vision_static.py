"""Time and memory of an encoder that multiplies int8 activations, beside float and folded int8 ones.

    python -m benchmarks.random_checkpoint 0.5b random
    python -m benchmarks.vision_static random --sizes 1024 512 --threads 1

Scales of activations are placeholders and weights are rounded plainly: neither changes what ONNX Runtime
executes, so no picture is needed. Every encoder runs in a process of its own, one picture each in turn.
Printed are CPU seconds, their ratio to the float encoder's in the same round, and the peak of memory.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.vision_weights import compare_encoders
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.exporters.onnx.data import ExternalData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.proto import write_graph
from fastvlm_convert.exporters.onnx.vision import build_vision
from fastvlm_convert.quantization.weight_plan import WeightPlan, plan_weights
from fastvlm_convert.quantized.activations import (
    WEIGHTS,
    LayerScales,
    TensorScale,
    gives_floats,
    is_depthwise,
    is_in_encoder,
    unquantizable,
)
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineMatrix
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, QuantizedWeight
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import Weight

SCALE = TensorScale(8, 0.05, 128)


def rounded(weight: Weight, start: int, stop: int) -> AffineMatrix:
    """Rows of a weight as int8 integers."""
    matrix = weight.read(start, stop).reshape(stop - start, -1)
    scale = np.maximum(np.abs(matrix).max(1, keepdims=True) / 127, 1e-5).astype(np.float16)
    q = np.clip(np.rint(matrix / scale.astype(np.float32)), -127, 127) + WEIGHTS.middle
    return AffineMatrix(WEIGHTS, q.astype(np.uint8), scale, np.full(scale.shape, WEIGHTS.middle, np.uint8))


def quantized(plan: WeightPlan, weights: Mapping[str, Weight], *, static: bool) -> MixedSource:
    """The encoder's weights as integers, with scales of activations where a recipe would have them."""
    made: dict[str, AnyWeight] = dict(weights)
    for layer in plan.layers:
        if is_in_encoder(layer.layer) and layer.scheme is not None:
            weight = weights[f"{layer.layer}.weight"]
            scales = layer_scales(layer) if static else None
            made[f"{layer.layer}.weight"] = QuantizedWeight(
                weight.shape, WEIGHTS, partial(rounded, weight), scales
            )
    return made


def layer_scales(layer: LayerPlan) -> LayerScales | None:
    """Placeholders; None of layers that multiply floats."""
    if is_depthwise(layer) or unquantizable(layer) is not None:
        return None
    return LayerScales(SCALE, None if gives_floats(layer) else SCALE)


def write_encoder(plan: WeightPlan, weights: MixedSource, path: Path) -> Path:
    """A vision graph with its data."""
    path.parent.mkdir()
    storage = plan.recipe.vision.storage
    with ExternalData(path.with_name(f"{path.name}_data")) as data:
        graph = Graph("fastvlm_vision", data, storage, "float32", lambda count: None)
        graph.folds_weights = True
        build_vision(graph, plan.config, weights, None)
    write_graph(graph, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    checkpoint = open_checkpoint(asked.checkpoint)
    recipe = load_recipe("int8-static")
    for size in asked.sizes:
        plan = plan_weights(checkpoint, replace(recipe, common=replace(recipe.common, image_size=size)))
        floats = fold(checkpoint.weights)
        with tempfile.TemporaryDirectory() as folder:
            made = {
                "float": floats,
                "int8 folded": quantized(plan, floats, static=False),
                "int8 static": quantized(plan, floats, static=True),
            }
            paths = {
                name: write_encoder(plan, weights, Path(folder) / name.replace(" ", "-") / "vision.onnx")
                for name, weights in made.items()
            }
            print(f"\n{size} pixels")
            compare_encoders(
                {name: (path, size) for name, path in paths.items()}, asked.rounds, asked.threads
            )


if __name__ == "__main__":
    main()
