"""Graphs in ONNX Runtime's own format, which reduced builds of it open: the same answers if types allow."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe, without_data
from tests.commands import ROOT

pytestmark = pytest.mark.slow
DEMO = ROOT / "checkpoints" / "fastvlm-demo"


def made(name: str, folder: Path) -> list[Path]:
    bundle = export(DEMO, folder / name, recipe=without_data(load_recipe(name)), targets=["onnx"]).bundle
    return sorted((bundle / "onnx").glob("*.onnx"))


def convert(graph: Path) -> Path:
    """As `python -m onnxruntime.tools.convert_onnx_models_to_ort` does it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(graph.with_suffix(".ort"))
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return graph.with_suffix(".ort")


@pytest.mark.parametrize("name", ["int8", "android-int4", "web-q4f16"])
def test_every_graph_opens_after_conversion(name, tmp_path):
    graphs = made(name, tmp_path)
    assert len(graphs) == 4
    for graph in graphs:
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        converted = onnxruntime.InferenceSession(convert(graph), providers=["CPUExecutionProvider"])
        assert [i.name for i in converted.get_inputs()] == [i.name for i in session.get_inputs()]
        if graph.name.startswith("vision_encoder"):
            pixels = np.random.default_rng(3).random((1, 3, 256, 256), np.float32)
            found = [s.run(None, {"pixel_values": pixels})[0] for s in (session, converted)]
            np.testing.assert_allclose(found[1], found[0], atol=1e-3)


def test_the_format_has_no_4_bit_tensors(tmp_path):
    """The page on ONNX says so; should it ever have them, this tells."""
    vision = next(graph for graph in made("web-small", tmp_path) if graph.name.startswith("vision_encoder"))
    with pytest.raises(Exception, match="Unsupported tensor data type"):
        onnxruntime.InferenceSession(convert(vision), providers=["CPUExecutionProvider"])
