"""Output errors and times of our solvers and of our peers', on the same layers.

    python -m benchmarks.quantize_layers
    python -m benchmarks.quantize_layers --layers LAYERS.npz --size 128

Layers are random with correlated inputs, or come from an .npz file with `NAME.weight` [rows, columns] and
`NAME.inputs` [tokens, columns]. Errors are squared errors of the outputs on unseen inputs, given as the
geometric mean of their ratio to coremltools' `linear_quantize_weights` (symmetric int4, same blocks). HQQ's
zero points are fractions. Limit: our GPTQ below the textbook's on every layer.
"""

import argparse
import logging
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from coremltools.optimize import _utils as coreml_numerics  # the function behind `linear_quantize_weights`
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

from fastvlm_convert.quantization.awq import channel_scales
from fastvlm_convert.quantization.error_compensation import hessian_of, output_error
from fastvlm_convert.quantization.gptq import gptq
from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantization.search import quantize_affine, round_to_nearest
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme
from tests.quantization.exhaustive_search import exhaustive
from tests.quantization.layers import correlated_inputs, textbook_gptq, weights

Layer = tuple[str, np.ndarray, np.ndarray]
Solver = Callable[[np.ndarray, np.ndarray], np.ndarray]
SHAPES = [(128, 256), (256, 512), (512, 256)]
BASE = "coremltools RTN sym"


def random_layers(seeds: int) -> Iterator[Layer]:
    """Name, weights and inputs."""
    for seed in range(seeds):
        for rows, columns in SHAPES:
            yield (
                f"{rows}x{columns} #{seed}",
                weights(seed, rows, columns),
                correlated_inputs(seed, columns, 4000),
            )


def stored_layers(path: Path) -> Iterator[Layer]:
    """The layers of a file."""
    with np.load(path) as arrays:
        for name in sorted(key.removesuffix(".weight") for key in arrays if key.endswith(".weight")):
            yield name, arrays[f"{name}.weight"], arrays[f"{name}.inputs"]


def coreml(weight: np.ndarray, size: int, mode: str) -> np.ndarray:
    """The int4 of coremltools with float16 scales, dequantized as a float32 target computes it."""
    q, scale, zero = coreml_numerics.compute_qparams(weight, 4, True, mode, np.int8, [1, size])
    scale, zero = (
        np.float32(0) if v is None else np.repeat(v, size, 1).astype(np.float32) for v in (scale, zero)
    )
    return (q.astype(np.float32) - zero) * scale.astype(np.float16).astype(np.float32)


def onnxruntime(weight: np.ndarray, config: object) -> np.ndarray:
    """The weights that ONNX Runtime's quantizer and kernel compute with, from a graph of one product."""
    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, rows])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    node = next(n for n in quantizer.model.model.graph.node if n.op_type == "MatMulNBits")
    stored = {i.name: numpy_helper.to_array(i) for i in quantizer.model.model.graph.initializer}
    size = next(a.i for a in node.attribute if a.name == "block_size")
    packed = stored[node.input[1]]
    q = np.stack([packed & 15, packed >> 4], -1).reshape(rows, -1, size).astype(np.float32)
    scale = stored[node.input[2]].reshape(rows, -1, 1).astype(np.float32)
    zero = np.float32(8)
    if len(node.input) > 3 and node.input[3]:
        zeros = stored[node.input[3]]
        if zeros.dtype == np.uint8:
            zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(rows, -1)[:, : q.shape[1]]
        zero = zeros.reshape(rows, -1, 1).astype(np.float32)
    return ((q - zero) * scale).reshape(rows, columns)


def solvers(size: int) -> dict[str, Solver]:
    """Every way to quantize a matrix, given also its Hessian."""
    free, even = AffineScheme(4, size, symmetric=False), AffineScheme(4, size, symmetric=True)
    tables = PaletteScheme(4, 16, per_channel_scale=True)
    default = nbits.DefaultWeightOnlyQuantConfig

    def scaled(w: np.ndarray, h: np.ndarray) -> np.ndarray:
        s = channel_scales([w], h, free)
        return gptq(w * s, h / np.outer(s, s), free).dequantized() / s

    return {
        BASE: lambda w, _: coreml(w, size, "LINEAR_SYMMETRIC"),
        "coremltools RTN": lambda w, _: coreml(w, size, "LINEAR"),
        "ORT default sym": lambda w, _: onnxruntime(w, default(block_size=size, is_symmetric=True)),
        "ORT default": lambda w, _: onnxruntime(w, default(block_size=size, is_symmetric=False)),
        "ORT HQQ": lambda w, _: onnxruntime(w, nbits.HQQWeightOnlyQuantConfig(block_size=size)),
        "textbook GPTQ": lambda w, h: textbook_gptq(w, h, free),
        "rounding": lambda w, _: round_to_nearest(w, free).dequantized(),
        "search sym": lambda w, _: quantize_affine(w, even).dequantized(),
        "search": lambda w, _: quantize_affine(w, free).dequantized(),
        "search, fine grid": lambda w, _: exhaustive(w, free).dequantized(),
        "search, diagonal": lambda w, h: quantize_affine(w, free, np.diag(h)).dequantized(),
        "GPTQ sym": lambda w, h: gptq(w, h, even).dequantized(),
        "GPTQ": lambda w, h: gptq(w, h, free).dequantized(),
        "GPTQ, AWQ scales": scaled,
        "palettes 4 bit": lambda w, _: palettize(w, tables).dequantized(),
        "palettes 4 bit, GPTQ": lambda w, h: palettize(w, tables, hessian=h).dequantized(),
    }


def main() -> int:
    """Print a table; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # ONNX Runtime logs every node

    ways = solvers(args.size)
    errors: dict[str, list[float]] = {name: [] for name in ways}
    seconds = dict.fromkeys(ways, 0.0)
    layers = stored_layers(args.layers) if args.layers else random_layers(args.seeds)
    for _, weight, inputs in layers:
        seen, unseen = hessian_of(inputs[::2]), hessian_of(inputs[1::2])
        for name, solve in ways.items():
            start = time.process_time()
            quantized = solve(weight, seen)
            seconds[name] += time.process_time() - start
            errors[name].append(output_error(weight, quantized, unseen))
    base = np.log(errors[BASE])
    print(f"{len(base)} layers, blocks of {args.size}: output error against {BASE}, CPU seconds, digest")
    for name, found in errors.items():
        ratio = np.exp(np.mean(np.log(found) - base))
        print(f"  {name:22} {ratio:7.4f} {seconds[name]:8.2f}  {zlib.crc32(np.array(found).tobytes()):08x}")
    worst = max(np.array(errors["GPTQ"]) / errors["textbook GPTQ"])
    print(f"GPTQ / textbook GPTQ, worst layer: {worst:.3f} (limit 1)")
    return int(worst >= 1)


if __name__ == "__main__":
    sys.exit(main())
