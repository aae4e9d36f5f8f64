"""Rounded activations: as ONNX Runtime rounds them, and a planted massive one is found."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.activation_levels import int8_activations, rounded, worst_layers
from benchmarks.quality.inputs import DEMO, pictures
from benchmarks.quality.judging import answered, judge, load, prepare, read_again
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import computed

ROWS, COLUMNS = 48, 256


def product(x: np.ndarray, q: np.ndarray, scale: np.ndarray, size: int, level: int) -> np.ndarray:
    """ONNX Runtime's product with 4-bit weights whose zero point is 8."""
    packed = (q[..., ::2] | q[..., 1::2] << 4).astype(np.uint8)
    attributes = {"K": COLUMNS, "N": ROWS, "bits": 4, "block_size": size, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (len(x), ROWS))],
        [numpy_helper.from_array(packed, "q"), numpy_helper.from_array(scale, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("size", [32, 64, 128])
def test_activations_are_rounded_as_onnx_runtime_rounds_them(size):
    rng = np.random.default_rng(size)
    q = rng.integers(0, 16, (ROWS, COLUMNS // size, size)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.02, (ROWS, COLUMNS // size)).astype(np.float32)
    x = rng.standard_normal((5, COLUMNS)).astype(np.float32) * rng.uniform(0.1, 3, COLUMNS).astype(np.float32)
    weight = ((q.astype(np.float32) - 8) * scale[..., None]).reshape(ROWS, COLUMNS)
    said = product(x, q, scale, size, level=4)
    ours = rounded(torch.from_numpy(x), size).numpy() @ weight.T
    exact = x @ weight.T
    assert np.abs(said - exact).max() > 1e-3  # it rounds
    assert np.linalg.norm(said - ours) < 0.02 * np.linalg.norm(said - exact)


def test_a_row_of_zeros_and_a_short_last_block():
    x = torch.tensor([[0.0] * 5, [1.0, -2.0, 0.0, 0.0, 3.0]])
    assert torch.equal(rounded(x, 4)[0], x[0])
    assert rounded(x, 4)[1, 4] == pytest.approx(3)


def test_a_planted_massive_activation_is_found():
    """One channel of one norm is 3000 times as large and its columns that much smaller: equal in float."""
    demo = open_checkpoint(DEMO)
    found = pictures("demo", True, 3, 2)
    asked = replace(found, questions=tuple(replace(q, known=()) for q in found.questions))
    floats = dict(fold(demo.weights))
    model = load(demo, floats)
    run = read_again(model, answered(demo, model, prepare(demo, asked), asked.max_tokens))
    before = dict(worst_layers(run, model, 64))

    planted, channel, factor = dict(floats), 5, 3000.0

    def scale(name: str, by: float) -> None:
        values = planted[name].array().copy()
        values[..., channel] *= by
        planted[name] = computed(values.shape, "float32", lambda: values)

    scale("decoder.layers.1.post_attention_layernorm.weight", factor)
    for part in ("gate_proj", "up_proj"):
        scale(f"decoder.layers.1.mlp.{part}.weight", 1 / factor)
    massive = load(demo, planted)
    exact = judge(demo, asked, run, massive)
    assert max(map(max, exact["kl"])) < 1e-4
    after = worst_layers(run, massive, 64)
    assert {name for name, _ in after[:2]} == {"layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"}
    assert before["layers.1.mlp.gate_proj"] - dict(after)["layers.1.mlp.gate_proj"] > 15

    cost = {}
    for kind in ("gate, up", "o"):
        with int8_activations(massive, [kind], 64):
            cost[kind] = np.mean(np.concatenate(judge(demo, asked, run, massive)["kl"]))
    assert cost["gate, up"] > 3 * cost["o"]
