"""Layers that multiply integers: what ONNX Runtime makes of them, against integer arithmetic."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fastvlm_convert.exporters.onnx.data import ExternalData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.ops import conv, linear
from fastvlm_convert.exporters.onnx.proto import write_graph
from fastvlm_convert.model.static_layer import StaticLayer
from fastvlm_convert.weights.source import Weight, computed
from tests.exporters.static_layers import (
    CHANNELS,
    EDGE,
    ROWS,
    bias,
    expected_conv,
    integers,
    pixels,
    scales_of,
    signed,
    weight,
)


def run(
    folder: Path, x: np.ndarray, shape: tuple[int, ...], build: Callable[[Graph], str]
) -> tuple[np.ndarray, Counter]:
    """What a graph gives, of a shape, and the operators that ONNX Runtime executes for it."""
    with ExternalData(folder / "g.onnx_data") as data:
        graph = Graph("test", data, "float16", "float32", lambda count: None)
        graph.input("x", "float32", ["batch", *x.shape[1:]])  # as encoders have it
        graph.output(build(graph), "float32", ["batch", *shape[1:]])
    write_graph(graph, folder / "g.onnx")
    model = onnx.load(folder / "g.onnx")
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x})
    ran = onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node
    return y, Counter(node.op_type for node in ran)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_convolution_multiplies_integers(bits, tmp_path):
    scales = scales_of(bits, output=True)
    kernel = weight((ROWS, CHANNELS, 1, 1), scales)
    stored = computed((ROWS,), "float32", bias)
    x = pixels()
    y, ran = run(tmp_path, x, (1, ROWS, EDGE, EDGE), lambda g: conv(g, "layer", "x", (kernel, stored)))
    assert scales.output is not None
    steps = y / np.float32(scales.output.scale)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-2 if bits == 16 else 1e-4)
    off = np.abs(np.rint(steps) - expected_conv(x, kernel, scales))
    assert off.max() <= 1  # where the middle between two integers is nearer than float32 tells
    assert (off > 0).mean() < (0.01 if bits == 8 else 0.1)
    assert ("QLinearConv" in ran) == (bits == 8)
    if bits == 16:  # has no kernel: floats are multiplied, with the same result
        assert "Conv" in ran


def test_a_linear_layer_multiplies_integers_and_adds_a_float_bias(tmp_path):
    scales = scales_of(8, output=False)
    matrix = weight((ROWS, CHANNELS), scales)
    stored = computed((ROWS,), "float32", bias)
    x = pixels().reshape(1, CHANNELS, -1).transpose(0, 2, 1).copy()
    y, ran = run(tmp_path, x, (1, EDGE**2, ROWS), lambda g: linear(g, "layer", "x", [matrix], [stored]))
    w, row_scale = signed(matrix)
    exact = integers(x, scales.input) @ w.T * (row_scale * np.float32(scales.input.scale)) + bias()
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    assert ran["MatMulIntegerToFloat"] == 1
    assert not {"MatMul", "Gemm"} & set(ran)


def test_a_linear_layer_with_16_bits_is_not_rounded_to_8_by_the_runtime(tmp_path):
    scales = scales_of(16, output=False)
    matrix = weight((ROWS, CHANNELS), scales)
    x = pixels().reshape(1, CHANNELS, -1).transpose(0, 2, 1).copy()
    y, ran = run(tmp_path, x, (1, EDGE**2, ROWS), lambda g: linear(g, "layer", "x", [matrix]))
    w, row_scale = signed(matrix)
    exact = integers(x, scales.input) @ w.T * (row_scale * np.float32(scales.input.scale))
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=2e-4)
    assert "MatMulNBits" not in ran


@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear"])
@torch.no_grad()
def test_the_reference_rounds_like_the_runtime(kind, tmp_path):
    scales = scales_of(8, output=kind != "linear")
    stored: Weight = computed((ROWS,), "float32", bias)
    if kind == "linear":
        layer: torch.nn.Conv2d | torch.nn.Linear = torch.nn.Linear(CHANNELS, ROWS)
        x = pixels().reshape(1, CHANNELS, -1).transpose(0, 2, 1).copy()
        held = weight((ROWS, CHANNELS), scales)
        y, _ = run(tmp_path, x, (1, EDGE**2, ROWS), lambda g: linear(g, "layer", "x", [held], [stored]))
    else:
        groups = ROWS if kind == "depthwise" else 1
        shape = (ROWS, 1, 3, 3) if groups > 1 else (ROWS, CHANNELS, 3, 3)
        layer = torch.nn.Conv2d(ROWS if groups > 1 else CHANNELS, ROWS, 3, 2, 1, groups=groups)
        x = np.concatenate([pixels()] * 2, 1)[:, : layer.in_channels].copy()
        held = weight(shape, scales)
        y, _ = run(
            tmp_path,
            x,
            (1, ROWS, EDGE // 2, EDGE // 2),
            lambda g: conv(g, "layer", "x", (held, stored), 2, groups),
        )
    layer.bias = torch.nn.Parameter(torch.from_numpy(bias()), requires_grad=False)
    ours = StaticLayer(layer, held)(torch.from_numpy(x)).numpy()
    step = scales.output.scale if scales.output else 1e-4
    off = np.abs(ours - y) / step
    assert off.max() <= 1 + 1e-3
    assert (off > 0.5).mean() < 0.01


def test_a_reference_follows_only_what_is_as_good_a_rounding():
    scales = scales_of(8, output=False)
    layer = StaticLayer(torch.nn.Linear(1, 1, bias=False), weight((1, 1), scales))
    read = scales.input
    x = torch.tensor([[[read.scale * 10.5]]])  # exactly between 10 and 11
    alone = layer(x)
    for step, follows in ((10, True), (11, True), (12, False), (9, False)):
        layer.follow = lambda what, step=step: torch.tensor([[[float(step + read.zero_point)]]])
        ratio = float(layer(x) / alone) * 10  # half to even: alone it takes 10
        assert ratio == pytest.approx(step if follows else 10)
