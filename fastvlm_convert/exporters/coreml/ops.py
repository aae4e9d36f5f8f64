"""The layers that the graphs are made of, each in the precision its name asks for."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from fastvlm_convert.exporters.coreml.graph import Graph, scalar
from fastvlm_convert.exporters.coreml.values import Value
from fastvlm_convert.exporters.coreml.weights import dense
from fastvlm_convert.quantized.weight import AnyWeight
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.source import Weight

_MIN_ROW: Final = 1e-3  # least divisor of a row before it is squared


def linear(
    graph: Graph, name: str, x: Value, weights: Sequence[AnyWeight], biases: Sequence[AnyWeight] = ()
) -> Value:
    """Multiply by W^T and add a bias; several weights are stacked along their output rows."""
    rows, dtype = sum(w.shape[0] for w in weights), graph.dtype(name)
    bias = dense(graph, f"{name}_bias", biases, dtype) if biases else zeros(graph, rows, name)
    return graph.op("linear", name, x=x, weight=dense(graph, f"{name}_weight", weights, dtype), bias=bias)


def zeros(graph: Graph, rows: int, owner: str) -> Value:
    """A bias for the operation `owner`, which has none: else coremltools writes one for every layer."""
    dtype = graph.dtype(owner)
    return graph.constant(f"zeros_{rows}_{dtype}", (rows,), lambda: np.zeros(rows), dtype)


def conv(
    graph: Graph, name: str, x: Value, weights: tuple[AnyWeight, AnyWeight], stride: int = 1, groups: int = 1
) -> Value:
    """Convolution by a kernel and a bias, with "same" padding."""
    (kernel, bias), dtype = weights, graph.dtype(name)
    return graph.op(
        "conv",
        name,
        x=x,
        weight=dense(graph, f"{name}_weight", [kernel], dtype),
        bias=dense(graph, f"{name}_bias", [bias], dtype),
        strides=[stride] * 2,
        pad_type="custom",
        pad=[kernel.shape[2] // 2] * 4,
        dilations=[1, 1],
        groups=groups,
    )


def gelu(graph: Graph, x: Value) -> Value:
    """Exact GELU, named after what it reads."""
    return graph.op("gelu", f"{x.name}_gelu", x=x, mode="EXACT")


def rms_norm(graph: Graph, name: str, x: Value, weight: Weight, config: DecoderConfig) -> Value:
    """RMSNorm over the last axis. In float16 a row is divided by its largest magnitude first.

    So no square overflows: with m = max(|x|, 1e-3), y = x / m and e = sqrt(eps) / m it is
    y / sqrt(mean(y^2) + e^2) * w, the same in real arithmetic, and finite for rows of zeros, of thousands and
    with outliers.
    """
    dtype = graph.dtype(name)

    def op(kind: str, part: str, **inputs: Any) -> Value:  # noqa: ANN401
        return graph.op(kind, f"{name}_{part}", dtype, **inputs)

    scale = dense(graph, f"{name}_weight", [weight], dtype)
    if dtype == "float32":
        mean = op("reduce_mean", "mean", x=op("square", "squared", x=x), axes=[-1], keep_dims=True)
        root = op("rsqrt", "rsqrt", x=mean, epsilon=scalar(dtype, config.norm_eps))
        return graph.op("mul", name, dtype, x=op("mul", "unit", x=x, y=root), y=scale)
    largest = op("reduce_max", "largest", x=op("abs", "abs", x=x), axes=[-1], keep_dims=True)
    divisor = op("maximum", "divisor", x=largest, y=scalar(dtype, _MIN_ROW * config.residual_scale))
    y = op("real_div", "scaled", x=x, y=divisor)
    e = op("real_div", "scaled_eps", x=scalar(dtype, math.sqrt(config.norm_eps)), y=divisor)
    mean = op("reduce_mean", "mean", x=op("mul", "squared", x=y, y=y), axes=[-1], keep_dims=True)
    total = op("add", "mean_eps", x=mean, y=op("mul", "eps_squared", x=e, y=e))
    root = op("rsqrt", "rsqrt", x=total, epsilon=scalar(dtype, 0))
    return graph.op("mul", name, dtype, x=op("mul", "unit", x=y, y=root), y=scale)
