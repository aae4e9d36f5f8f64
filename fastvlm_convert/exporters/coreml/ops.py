"""The layers that the graphs are made of, each in the precision its name asks for."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from fastvlm_convert.exporters.coreml.graph import Graph, scalar
from fastvlm_convert.exporters.coreml.split import column_parts, joined, row_spans, rows_of
from fastvlm_convert.exporters.coreml.static import rounded_input, static_conv
from fastvlm_convert.exporters.coreml.values import Value
from fastvlm_convert.exporters.coreml.weights import dense
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.weight import AnyWeight, is_static
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.source import Weight

# A score that no query sees; finite, so that no infinity is ever computed.
HIDDEN: Final[dict[FloatName, float]] = {"float32": -1e30, "float16": -6e4}
_MIN_ROW: Final = 1e-3  # least divisor of a row before it is squared


def linear(
    graph: Graph, name: str, x: Value, weights: Sequence[AnyWeight], biases: Sequence[AnyWeight] = ()
) -> Value:
    """Multiply by W^T and add a bias; several weights are stacked along their output rows.

    Where the stack is wider than the graph allows, its parts are multiplied one by one.
    """
    rows, dtype = sum(w.shape[0] for w in weights), graph.dtype(name)
    if len(weights) == 1 and is_static(weight := weights[0]):
        x = rounded_input(graph, name, x, weight)
    if max(rows, weights[0].shape[1]) > graph.widest:
        return _wide_linear(graph, name, x, joined(weights), joined(biases) if biases else None)
    bias = dense(graph, f"{name}_bias", biases, dtype) if biases else zeros(graph, rows, dtype)
    return graph.op("linear", name, x=x, weight=dense(graph, f"{name}_weight", weights, dtype), bias=bias)


def _wide_linear(graph: Graph, name: str, x: Value, weight: AnyWeight, bias: AnyWeight | None) -> Value:
    """Parts of the outputs one after the other, each the sum over parts of the inputs."""
    dtype, spans = graph.dtype(name), row_spans(weight, graph.widest)
    if len(spans) == 1:
        return _summed_linear(graph, name, x, (weight, bias), dtype)
    parts = [(rows_of(weight, span), bias and rows_of(bias, span)) for span in spans]
    outputs = [_summed_linear(graph, f"{name}_{i}", x, part, dtype) for i, part in enumerate(parts)]
    return graph.op("concat", name, dtype, values=outputs, axis=-1)


def _summed_linear(
    graph: Graph, name: str, x: Value, weights: tuple[AnyWeight, AnyWeight | None], dtype: FloatName
) -> Value:
    """A product and a bias, in parts where there are more inputs than the graph allows."""
    weight, bias = weights
    nothing = zeros(graph, weight.shape[0], dtype)
    first = nothing if bias is None else dense(graph, f"{name}_bias", [bias], dtype)
    parts = column_parts(weight, graph.widest)
    if len(parts) == 1:
        matrix = dense(graph, f"{name}_weight", parts, dtype)
        return graph.op("linear", name, dtype, x=x, weight=matrix, bias=first)
    widths = [part.shape[1] for part in parts]
    inputs = graph.split_op("split", f"{name}_inputs", x=x, split_sizes=widths, axis=-1)
    products = [
        graph.op(
            "linear",
            f"{name}_in{i}",
            dtype,
            x=inputs[i],
            weight=dense(graph, f"{name}_in{i}_weight", [part], dtype),
            bias=nothing if i else first,
        )
        for i, part in enumerate(parts)
    ]
    total = products[0]
    for i, product in enumerate(products[1:-1], 1):
        total = graph.op("add", f"{name}_sum{i}", dtype, x=total, y=product)
    return graph.op("add", name, dtype, x=total, y=products[-1])


def zeros(graph: Graph, rows: int, dtype: FloatName) -> Value:
    """A bias for operations that have none: else coremltools writes one for every layer."""
    return graph.constant(f"zeros_{rows}_{dtype}", (rows,), lambda: np.zeros(rows), dtype)


def attention(
    graph: Graph, name: str, heads: tuple[Value, Value, Value], mask: Value | None, *, is_fused: bool
) -> Value:
    """softmax(q k^T / sqrt(D)) v in the precision that the name asks for.

    Args:
        graph: The graph that gets it.
        name: Unique name.
        heads: Queries [1, heads, n, D], keys and values [1, heads, m, D].
        mask: bool [1, 1, n, m], true where a query may look; None for everywhere.
        is_fused: Whether it is one operation, or one after the other.
    """
    query, key, value = heads
    if is_fused:
        masked: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
        kind = "scaled_dot_product_attention"
        return graph.op(kind, name, query=query, key=key, value=value, **masked)
    dtype = graph.dtype(name)
    scale = scalar(dtype, query.shape[-1] ** -0.5)
    scaled = graph.op("mul", f"{name}_scaled", dtype, x=query, y=scale)
    scores = graph.op("matmul", f"{name}_scores", dtype, x=scaled, y=key, transpose_y=True)
    if mask is not None:
        # Not a sum with a mask of numbers: that pattern is fused again (coremltools issue 2650).
        hidden = scalar(dtype, HIDDEN[dtype])
        scores = graph.op("select", f"{name}_masked", dtype, cond=mask, a=scores, b=hidden)
    shares = graph.op("softmax", f"{name}_softmax", dtype, x=scores, axis=-1)
    return graph.op("matmul", name, dtype, x=shares, y=value)


def conv(
    graph: Graph, name: str, x: Value, weights: tuple[AnyWeight, AnyWeight], stride: int = 1, groups: int = 1
) -> Value:
    """Convolution by a kernel and a bias, with "same" padding."""
    (kernel, bias), dtype = weights, graph.dtype(name)
    if is_static(kernel):
        assert isinstance(bias, Weight)
        return static_conv(graph, name, x, (kernel, bias), stride, groups)
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
