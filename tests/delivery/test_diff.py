"""What differs between two bundles, and the quality that was recorded of them."""

import pytest

from fastvlm_convert.delivery.diff import diff_bundles
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.verification.bundle import VerifyResult
from fastvlm_convert.verification.check import Check, Measurement
from fastvlm_convert.verification.record import write_record
from tests.bundles import copy_bundle, edit_manifest, export_bundle, mixed_recipe
from tests.checkpoints import GOLDEN, LLAVA


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return export_bundle(
        GOLDEN / LLAVA / "checkpoint", tmp_path_factory.mktemp("m") / "mixed", mixed_recipe()
    )


def recorded(bundle, value: float | None, version: str = "1.32.0") -> None:
    by = f"onnxruntime {version}"
    check = Check("onnx", "end_to_end", "top1_agreement", 1.0, False, by, 0.9, "passed", None)
    skipped = Check("onnx", "end_to_end", "identical_share", None, False, None, 1, "not_run", "why")
    kl = Measurement("onnx", "end_to_end", "kl_mean_nats", value, value is None, by)
    other = Measurement("onnx", "decode_logits", "kl_mean_nats", 9.0, False, by)
    write_record(bundle, VerifyResult((check, skipped), (kl, other), (), 2, "0" * 64))


def test_a_bundle_does_not_differ_from_itself(fp32_bundle, tmp_path):
    copy = copy_bundle(fp32_bundle, tmp_path)
    found = diff_bundles(fp32_bundle, copy)
    assert (found.settings, found.layers) == ({}, ())
    assert {change.change for change in found.files} == {"same"}
    assert found.sizes[0] == found.sizes[1] > 0
    assert found.schemes[0] == found.schemes[1]


def test_files_layers_schemes_sizes_and_settings(fp32_bundle, mixed):
    found = diff_bundles(fp32_bundle, mixed)
    changes = {change.name: change for change in found.files}
    assert set(changes) == {*load_manifest(fp32_bundle).files, *load_manifest(mixed).files}
    assert changes["tokenizer.json"].change == "same"
    assert changes["README.md"].change == "changed"
    assert (changes["onnx/vision_encoder.onnx"].change, changes["onnx/vision_encoder.onnx"].size_b) == (
        "only_a", None,
    )  # fmt: skip
    assert {change.change for change in found.files} == {"same", "changed", "only_a", "only_b"}
    for n, bundle in enumerate((fp32_bundle, mixed)):
        assert found.sizes[n] == sum(entry.size for entry in load_manifest(bundle).files.values())
    layer = next(c for c in found.layers if c.layer == "decoder.layers.0.self_attn.o_proj")
    assert (layer.a.scheme, layer.b.scheme) == ("float32", "int4 block 16, asymmetric")
    assert found.settings["recipe.name"] == ("fp32", "mixed")
    assert "contract.prompt" not in found.settings
    assert sum(found.schemes[0].values()) == sum(found.schemes[1].values()) == len(found.layers)
    assert set(found.schemes[0]) == {f"{p}: float32" for p in ("vision", "projector", "decoder", "embedding")}


class TestQuality:
    def test_without_a_record_it_was_not_run(self, fp32_bundle, mixed):
        for quality in diff_bundles(fp32_bundle, mixed).quality:
            assert (quality.status, quality.figures) == ("not_run", {})
            assert "has no verification.json" in quality.reason

    def test_with_one_it_is_what_was_recorded(self, fp32_bundle, tmp_path):
        a, b = (copy_bundle(fp32_bundle, tmp_path / name) for name in "ab")
        recorded(a, None)
        recorded(b, 1e-3, version="1.40.1")
        one, two = diff_bundles(a, b).quality
        assert one.figures == {
            "onnx, onnxruntime: kl_mean_nats": "equal", "onnx, onnxruntime: top1_agreement": 1.0,
        }  # fmt: skip
        assert two.figures.keys() == one.figures.keys()
        assert two.figures["onnx, onnxruntime: kl_mean_nats"] == 1e-3
        assert (one.status, one.reason, one.num_questions) == ("not_run", None, 2)

    def test_a_record_about_another_manifest_counts_for_nothing(self, fp32_bundle, tmp_path):
        bundle = copy_bundle(fp32_bundle, tmp_path)
        recorded(bundle, 1e-3)
        edit_manifest(bundle, lambda m: m.update(tool="9"))
        quality = diff_bundles(fp32_bundle, bundle).quality[1]
        assert (quality.status, quality.figures) == ("not_run", {})
        assert "about another manifest" in quality.reason


def test_a_bundle_without_a_list_of_layers_is_compared_in_everything_else(fp32_bundle, tmp_path):
    bundle = copy_bundle(fp32_bundle, tmp_path)
    (bundle / "layers.json").unlink()
    edit_manifest(bundle, lambda m: m["files"].pop("layers.json"))
    found = diff_bundles(bundle, fp32_bundle)
    assert found.layers is None
    assert {c.name for c in found.files if c.change == "only_b"} == {"layers.json"}
