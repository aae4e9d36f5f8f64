from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.predict.export_plan import prepare
from fastvlm_convert.predict.sizes import predicted_sizes
from tests.exporters.onnx.conftest import Variant


def test_sizes_are_known_before_anything_is_written(variant: Variant):
    prepared = prepare(variant.checkpoint, variant.settings, ["onnx"])
    token_id = prepared.contract.image_token_id
    predicted = predicted_sizes(
        prepared.config, prepared.plans, prepared.recipe, ["onnx"], image_token_id=token_id
    )
    written = load_manifest(variant.bundle).files
    assert predicted == {name: entry.size for name, entry in written.items() if name.startswith("onnx/")}
