from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.predict.export_plan import plan_export, predicted_artifacts
from tests.exporters.onnx.conftest import Variant


def test_sizes_are_known_before_anything_is_written(variant: Variant):
    plan = plan_export(open_checkpoint(variant.checkpoint), variant.settings, ["onnx"])
    predicted = predicted_artifacts(plan).sizes
    written = load_manifest(variant.bundle).files
    assert predicted == {name: entry.size for name, entry in written.items() if name.startswith("onnx/")}
