"""`decoder.compute: auto` is one of the two dtypes on each target, to the byte."""

import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export
from fastvlm_convert.predict.export_plan import plan_export, predicted_artifacts
from tests.bundles import FP16, recipe
from tests.exporters.stored import CHECKPOINT


def files_of(folder, target: str, compute: str) -> dict[str, bytes]:
    """Everything that a bundle has for its target, and what its manifest says the decoder computes in."""
    settings = recipe(FP16, decoder={"compute": compute})
    export(CHECKPOINT, folder, recipe=settings, targets=[target])
    decoder = load_manifest(folder).artifact(target, "decoder", "main" if target == "onnx" else "decode")
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / target).rglob("*"))
        if path.is_file()
    }
    return {**files, "computes in": decoder.compute.encode()}


@pytest.mark.parametrize(("target", "own", "other"), [
    ("onnx", "float32", "float16"),
    ("coreml", "float16", "float32"),
])  # fmt: skip
def test_auto_is_the_dtype_of_the_target(target, own, other, tmp_path):
    found = {
        compute: files_of(tmp_path / compute, target, compute) for compute in ("auto", "float16", "float32")
    }
    assert found["auto"] == found[own]
    assert found["auto"]["computes in"] == own.encode()
    assert found["auto"] != found[other]


def test_auto_is_float16_in_mlx():
    def predicted(compute: str):
        settings = recipe(FP16, decoder={"compute": compute})
        return predicted_artifacts(plan_export(open_checkpoint(CHECKPOINT), settings, ["mlx"]))

    auto = predicted("auto")
    assert auto == predicted("float16")
    assert {a.compute for a in auto.artifacts if a.component == "decoder"} == {"float16"}
