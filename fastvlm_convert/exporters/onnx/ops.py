"""The layers that the graphs are made of."""

from collections.abc import Sequence

from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.static import input_scale, rounded, static_conv, static_linear
from fastvlm_convert.exporters.onnx.weights import dense, floats
from fastvlm_convert.quantized.weight import AnyWeight, is_static
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.source import Weight


def linear(
    graph: Graph, name: str, x: str, weights: Sequence[AnyWeight], biases: Sequence[Weight] = ()
) -> str:
    """Multiply by W^T and add a bias; several weights are stacked along their output rows."""
    if len(weights) == 1 and is_static(weight := weights[0]):
        if input_scale(weight).bits == 8:
            return static_linear(graph, name, x, weight, biases[0] if biases else None)
        # Of dequantized integers, ONNX Runtime would make a MatMulNBits that rounds activations to 8 bits.
        x = rounded(graph, f"{name}_input", x, input_scale(weight))
    matrix = dense(graph, f"{name}_weight", weights)
    if not biases:
        return graph.fused("FusedMatMul", name, [x, matrix], transB=1)
    product = graph.fused("FusedMatMul", f"{name}_product", [x, matrix], transB=1)
    return graph.op("Add", name, [product, floats(graph, f"{name}_bias", biases)])


def conv(
    graph: Graph, name: str, x: str, weights: tuple[AnyWeight, Weight], stride: int = 1, groups: int = 1
) -> str:
    """Convolution by a kernel and a bias, with "same" padding."""
    kernel, bias = weights
    if is_static(kernel):
        return static_conv(graph, name, x, (kernel, bias), stride, groups)
    size = kernel.shape[2]
    return graph.op(
        "Conv",
        name,
        [x, dense(graph, f"{name}_weight", [kernel]), floats(graph, f"{name}_bias", [bias])],
        kernel_shape=[size] * 2,
        strides=[stride] * 2,
        pads=[size // 2] * 4,
        group=groups,
    )


def gelu(graph: Graph, x: str) -> str:
    """Exact GELU, named after what it reads."""
    return graph.op("Gelu", f"{x}_gelu", [x])


def rms_norm_of_sum(
    graph: Graph, name: str, x: str, skip: str, weight: Weight, config: DecoderConfig
) -> tuple[str, str]:
    """RMSNorm of x + skip, and that sum: ONNX Runtime has one operator for both."""
    scale = floats(graph, f"{name}_weight", [weight])
    residual = f"{name}_residual"
    normed = graph.fused(
        "SkipSimplifiedLayerNormalization",
        name,
        [x, skip, scale],
        outputs=[name, "", "", residual],
        epsilon=config.norm_eps,
    )
    return normed, residual
