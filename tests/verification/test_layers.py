"""Operations of every target under one name, equal where the program is right."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.io_names import op_component
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime import onnx_values
from fastvlm_convert.runtime.loaded import load_bundle, load_folded_reference, load_reference
from fastvlm_convert.targets import Target
from fastvlm_convert.verification.executions import executions
from fastvlm_convert.verification.layers import CandidateValues, Layers, ReferenceValues, first_divergence
from tests.bundles import copy_bundle, external_regions, graph_path, load_graph, recipe
from tests.checkpoints import GOLDEN, LLAVA, golden_cases

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
QUESTION = next(Question((load_image(c.image),), c.question) for c in golden_cases() if c.name == LLAVA)
GATES = {"image_features": 100.0, "prefill_logits": 60.0}


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("layers") / "both"
    export(CHECKPOINT, output, recipe=recipe(), targets=["onnx", "coreml"])
    return output


@pytest.fixture(scope="module")
def reference() -> ReferenceValues:
    return ReferenceValues(load_reference(open_checkpoint(CHECKPOINT)), QUESTION)


def layers_of(bundle: Path, target: Target, values: ReferenceValues) -> Layers:
    manifest = load_manifest(bundle)
    (execution,) = executions(manifest, target, False)
    loaded = load_bundle(bundle, target, execution.precision)
    theirs = CandidateValues(values)
    assert execution.expose is not None
    execution.expose(bundle, manifest, loaded, theirs)
    return theirs.figures(target, loaded.session.executed_by)


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_every_operation_of_a_sound_bundle_is_seen_and_right(both, reference, target):
    found = layers_of(both, target, reference)
    assert [f.name for f in found.figures] == list(reference.names)
    names = [f.name for f in found.figures]
    assert {"stem_0", "s3b0_qkv", "projector_fc2", "l0_qkv", "l1_down", "l1_residual", "logits"} <= set(names)
    assert (
        names.index("stem_0") < names.index("projector_fc2") < names.index("l0_qkv") < names.index("logits")
    )
    assert all(f.is_run for f in found.figures)
    vision = [f.decibels for f in found.figures if not f.name.startswith(("l0_", "l1_", "final_norm", "log"))]
    assert min(vision) > 105
    assert min(f.decibels for f in found.figures) > (105 if target == "onnx" else 60)  # its cache is float16
    assert first_divergence(found, GATES) is None


def test_folding_changes_no_operation(reference):
    """BatchNorm and LayerScale belong to the operation before them on either side."""
    folded, _ = load_folded_reference(open_checkpoint(CHECKPOINT))
    found = reference.again(folded).figures("weights", "torch")
    assert min(f.decibels for f in found.figures) > 105
    assert all(f.is_run for f in found.figures)


@pytest.mark.parametrize(("component", "layer"), [("vision", "s2b0_fc1"), ("decoder", "l1_down")])
def test_the_first_operation_that_parts_is_the_one_that_was_changed(
    both, reference, tmp_path, component, layer
):
    bundle = copy_bundle(both, tmp_path)
    location, offset, length = external_regions(load_graph(bundle, component))[f"{layer}_weight"]
    path = graph_path(bundle, component).parent / location
    values = np.memmap(path, np.float32, "r+", offset, (length // 4,))
    values[: len(values) // 2] *= 1.05
    values.flush()
    found = first_divergence(layers_of(bundle, "onnx", reference), GATES)
    assert found is not None
    assert (found.layer, found.stage) == (
        layer, "image_features" if component == "vision" else "prefill_logits"
    )  # fmt: skip
    assert ", below " in found.reason
    assert " before it has 1" in found.reason


def test_values_come_in_batches_where_they_are_large(both, reference, monkeypatch):
    """What is handed out decides what ONNX Runtime fuses, so the last bits may change."""
    of_decoder = [size for name, size in reference.num_bytes.items() if op_component(name) == "decoder"]
    monkeypatch.setattr(onnx_values, "_AT_ONCE", max(of_decoder))
    sizes: list[int] = []
    run = onnx_values._run
    monkeypatch.setattr(
        onnx_values, "_run", lambda p, m, names, *more: (sizes.append(len(names)), run(p, m, names, *more))
    )
    found = layers_of(both, "onnx", reference)
    assert len(sizes) > 4
    assert sum(sizes) == len(reference.names) == sum(f.is_run for f in found.figures)
    assert min(f.decibels for f in found.figures) > 105


def test_a_value_that_the_graph_has_not_is_said(both, reference, tmp_path):
    bundle = copy_bundle(both, tmp_path)
    path = graph_path(bundle, "vision")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["s2b0_xyz" if name == "s2b0_fc1" else name for name in names]
    path.write_bytes(model.SerializeToString())
    found = {f.name: f for f in layers_of(bundle, "onnx", reference).figures}
    assert (found["s2b0_fc1"].sqnr_db, found["s2b0_fc1"].is_run) == (None, False)
    assert found["s2b0_fc1"].reason == "the graph has no value of this name"
    assert found["s2b0_fc2"].is_run


def test_a_graph_that_prepares_pictures_itself_is_seen_as_well(reference, tmp_path):
    bundle = tmp_path / "in_graph"
    settings = recipe(onnx={"preprocessing": "in_graph"})
    export(CHECKPOINT, bundle, recipe=settings, targets=["onnx"])
    found = layers_of(bundle, "onnx", reference)
    assert min(f.decibels for f in found.figures) > 100
    assert all(f.is_run for f in found.figures)
