"""Layers that multiply integers in Core ML packages: what the program says, and what it computes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.models.utils import load_spec

from fastvlm_convert.exporters.coreml.graph import Graph
from fastvlm_convert.exporters.coreml.metadata import Metadata
from fastvlm_convert.exporters.coreml.ops import conv, linear
from fastvlm_convert.exporters.coreml.paths import FILES
from fastvlm_convert.exporters.coreml.proto import write_package
from fastvlm_convert.exporters.coreml.proto_size import package_bytes
from fastvlm_convert.exporters.coreml.values import Value
from fastvlm_convert.mil import Interpreter
from fastvlm_convert.model.static_layer import StaticLayer
from fastvlm_convert.quantized.activations import LayerScales
from fastvlm_convert.recipe_settings import FloatSettings
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

METADATA = Metadata("a layer", "none", {}, {"x": "read", "layer": "given"})
STORED: Weight = computed((ROWS,), "float32", bias)


def run(folder: Path, x: np.ndarray, build: Callable[[Graph, Value], Value]) -> tuple[np.ndarray, dict]:
    """What a package gives, and what each of its operations gives."""
    graph = Graph("main", {}, FloatSettings("float16", "float32"), lambda count: None)
    graph.output(build(graph, graph.input("x", "float32", x.shape)))
    path = folder / "layer.mlpackage"
    write_package(path, [graph], METADATA)
    # Predicted to the byte, and a program that coremltools takes.
    sizes = tuple((path / file).stat().st_size for file in FILES[1:])
    assert package_bytes([graph], METADATA) == sizes
    load_program(load_spec(str(path / FILES[1])), 9, str((path / FILES[2]).parent)).validate()
    seen = {}

    def see(result) -> None:
        seen[result.name] = (result.type, result.outputs[result.name])

    (y,) = Interpreter(path).predict({"x": x}, on_op=see).values()
    return y, seen


def test_a_convolution_stands_between_integers_as_coremltools_writes_them(tmp_path):
    kernel = weight((ROWS, CHANNELS, 1, 1), scales_of(8, output=True))
    _, seen = run(tmp_path, pixels(), lambda g, x: conv(g, "layer", x, (kernel, STORED)))
    assert [(name, kind) for name, (kind, _) in seen.items()] == [
        ("layer_input_integers", "quantize"),
        ("layer_input", "dequantize"),
        ("layer_products", "conv"),
        ("layer_integers", "quantize"),
        ("layer", "dequantize"),
    ]
    for name in ("layer_input_integers", "layer_integers"):
        q = seen[name][1]
        assert q.dtype == np.int32  # of int8, as the interpreter holds them
        assert q.min() < 0 < q.max()
        assert q.min() >= -128
        assert q.max() <= 127


def test_a_convolution_multiplies_the_integers_that_the_reference_multiplies(tmp_path):
    scales = scales_of(8, output=True)
    kernel = weight((ROWS, CHANNELS, 1, 1), scales)
    x = pixels()
    y, seen = run(tmp_path, x, lambda g, v: conv(g, "layer", v, (kernel, STORED)))
    unsigned = seen["layer_input_integers"][1] + 128 - scales.input.zero_point
    np.testing.assert_array_equal(unsigned, integers(x, scales.input))
    assert scales.output is not None
    off = np.abs(np.rint(y / np.float32(scales.output.scale)) - expected_conv(x, kernel, scales))
    assert off.max() <= 1  # where the middle between two integers is nearer than float32 tells
    assert (off > 0).mean() < 0.01


def test_a_bias_is_whole_steps_of_the_products(tmp_path):
    """What integer kernels add: half a step more or less must not come from float16 either."""
    scales = scales_of(8, output=True)
    kernel = weight((ROWS, CHANNELS, 1, 1), scales)
    x = np.zeros((1, CHANNELS, EDGE, EDGE), np.float32)  # so that the products are the bias alone
    _, seen = run(tmp_path, x, lambda g, v: conv(g, "layer", v, (kernel, STORED)))
    _, row_scale = signed(kernel)
    steps = seen["layer_products"][1][0, :, 0, 0] / (row_scale * np.float32(scales.input.scale))
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-2)
    assert np.abs(steps).max() > 100


@pytest.mark.parametrize("widest", [np.inf, ROWS // 2])
def test_a_linear_layer_multiplies_integers_and_adds_a_float_bias(widest, tmp_path):
    scales = scales_of(8, output=False)
    matrix = weight((ROWS, CHANNELS), scales)
    x = pixels().reshape(1, CHANNELS, -1).transpose(0, 2, 1).copy()

    def build(graph: Graph, value: Value) -> Value:
        graph.widest = widest
        return linear(graph, "layer", value, [matrix], [STORED])

    y, _ = run(tmp_path, x, build)
    w, row_scale = signed(matrix)
    exact = integers(x, scales.input) @ w.T * (row_scale * np.float32(scales.input.scale)) + bias()
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, ROWS])
@torch.no_grad()
def test_the_reference_rounds_like_the_interpreter(groups, tmp_path):
    scales = scales_of(8, output=True)
    channels = ROWS if groups > 1 else CHANNELS
    held = weight((ROWS, 1 if groups > 1 else channels, 3, 3), scales)
    layer = torch.nn.Conv2d(channels, ROWS, 3, 2, 1, groups=groups)
    layer.bias = torch.nn.Parameter(torch.from_numpy(bias()), requires_grad=False)
    x = np.concatenate([pixels()] * 2, 1)[:, :channels].copy()
    y, _ = run(tmp_path, x, lambda g, v: conv(g, "layer", v, (held, STORED), 2, groups))
    off = np.abs(StaticLayer(layer, held)(torch.from_numpy(x)).numpy() - y) / scales.output.scale
    assert off.max() <= 1 + 1e-3
    assert (off > 0.5).mean() < 0.01


def test_halves_go_to_even_and_what_lies_outside_to_the_ends(tmp_path):
    """Scale and zero point are such that float32 holds each quotient."""
    scales = LayerScales(replace(scales_of(8, output=False).input, scale=0.5, zero_point=130), None)
    matrix = weight((ROWS, 8), scales)
    x = np.array([[0.25, 0.75, 1.25, -0.25, -0.75, 1000, -1000, 0]], np.float32)
    _, seen = run(tmp_path, x, lambda g, v: linear(g, "layer", v, [matrix]))
    expected = [[2, 4, 4, 2, 0, 127, -128, 2]]
    np.testing.assert_array_equal(seen["layer_input_integers"][1], expected)
