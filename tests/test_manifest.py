import dataclasses
import hashlib
import json
from importlib import metadata

import pytest

from fastvlm_convert import __version__
from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint
from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import FILE_NAME, changed_files, is_bundle, load_manifest
from tests.bundles import copy_bundle, edit_manifest
from tests.checkpoints import GOLDEN, LLAVA

DATA = "onnx/vision_encoder.onnx_data"


@pytest.fixture
def bundle(fp32_bundle, tmp_path):
    return copy_bundle(fp32_bundle, tmp_path)


class TestContent:
    def test_every_file_is_listed_with_size_and_hash(self, fp32_bundle):
        files = {
            path.relative_to(fp32_bundle).as_posix(): path
            for path in fp32_bundle.rglob("*")
            if path.is_file() and path.name != FILE_NAME
        }
        manifest = load_manifest(fp32_bundle)
        assert list(manifest.files) == sorted(files)
        for name, entry in manifest.files.items():
            content = files[name].read_bytes()
            assert entry.size == len(content)
            assert entry.sha256 == hashlib.sha256(content).hexdigest()

    def test_versions_source_and_recipe(self, fp32_bundle):
        value = json.loads((fp32_bundle / FILE_NAME).read_text())
        assert (value["schema"], value["schema_version"]) == ("fastvlm-convert/bundle", 2)
        manifest = load_manifest(fp32_bundle)
        assert manifest.tool == __version__
        for name in ("numpy", "onnx", "tokenizers"):
            assert manifest.libraries[name] == metadata.version(name)
        checkpoint = open_checkpoint(GOLDEN / LLAVA / "checkpoint")
        assert manifest.source.layout == "llava_qwen2"
        assert manifest.source.sha256 == content_hash(checkpoint.files)
        assert manifest.recipe.name == "fp32"
        assert manifest.fp16_range == "not_run"

    def test_the_recipe_is_resolved(self, fp32_bundle):
        common = load_manifest(fp32_bundle).recipe.common
        assert (common.image_size, common.image_mode) == (256, "pad")

    def test_it_depends_on_no_path_or_host(self, fp32_bundle):
        text = (fp32_bundle / FILE_NAME).read_text()
        assert str(fp32_bundle.parent) not in text
        assert str(GOLDEN) not in text

    def test_round_trip(self, bundle):
        manifest = load_manifest(bundle)
        text = (bundle / FILE_NAME).read_text()
        assert manifest.to_json() == text
        (bundle / FILE_NAME).write_text(manifest.to_json())
        assert load_manifest(bundle) == manifest

    def test_artifacts_by_target_and_component(self, fp32_bundle):
        manifest = load_manifest(fp32_bundle)
        assert manifest.targets == ("onnx",)
        assert {a.component for a in manifest.artifacts} == {"vision", "embed", "decoder"}
        embed = manifest.artifact("onnx", "embed")
        assert embed.files == ("onnx/embed_tokens.onnx", "onnx/decoder_model_merged.onnx_data")
        with pytest.raises(BundleError, match="the bundle has no coreml vision"):
            manifest.artifact("coreml", "vision")


def remove(key: str):
    return lambda m: m.pop(key)


MALFORMED = {
    "missing_section": (remove("contract"), "missing setting contract"),
    "unknown_section": (lambda m: m.update(extra=1), "unknown setting extra"),
    "missing_key": (lambda m: m["source"].pop("sha256"), "missing setting source.sha256"),
    "unknown_recipe_key": (lambda m: m["recipe"]["common"].update(sise=1), "recipe.common.sise"),
    "impossible_recipe": (
        lambda m: m["recipe"]["gates"].update(max_new_tokens=0),
        "recipe.gates.max_new_tokens is 0, expected 1 to 1024",
    ),
    "text_for_number": (
        lambda m: m["contract"].update(image_size="256"),
        "contract.image_size is '256', expected an integer",
    ),
    "unknown_mode": (lambda m: m["contract"].update(image_mode="warp"), "expected 'pad' or 'crop'"),
    "tokens_do_not_fit": (
        lambda m: m["contract"].update(num_image_tokens=17),
        "num_image_tokens 17 does not fit image_size 256",
    ),
    "absurd_context": (lambda m: m["contract"].update(context_length=1 << 40), "contract.context_length"),
    "negative_context": (lambda m: m["contract"].update(context_length=-1), "contract.context_length"),
    "unknown_target": (lambda m: m["artifacts"][0].update(target="tpu"), "artifacts[0].target is 'tpu'"),
    "unknown_component": (lambda m: m["artifacts"][0].update(component="ear"), "artifacts[0].component"),
    "shape_is_no_list": (
        lambda m: m["artifacts"][0]["inputs"][0].update(shape="any"),
        "artifacts[0].inputs[0].shape is 'any', expected a list",
    ),
    "no_end_tokens": (lambda m: m["contract"].update(eos_token_ids=[]), "expected ids of tokens"),
    "a_negative_token": (lambda m: m["contract"].update(image_token_id=-1), "expected ids of tokens"),
    "a_gate_that_is_none": (
        lambda m: m["recipe"]["gates"].update(device_min_sqnr_db=float("nan")),
        "recipe.gates.device_min_sqnr_db is nan, expected 0 to 200",
    ),
    "a_gate_that_nothing_fails": (
        lambda m: m["recipe"]["gates"].update(runtime_max_kl_nats=float("inf")),
        "recipe.gates.runtime_max_kl_nats is inf, expected 0 to 100",
    ),
    "a_gate_too_large_for_a_float": (
        lambda m: m["recipe"]["gates"].update(min_sqnr_db=10**390),
        "recipe.gates.min_sqnr_db is an integer of some 388 digits, expected a number",
    ),
    "artifacts_are_no_list": (lambda m: m.update(artifacts={}), "artifacts is {}, expected a list"),
    "files_are_no_mapping": (lambda m: m.update(files=[]), "files is [], expected a mapping"),
    "size_is_text": (lambda m: m["files"][DATA].update(size="1"), f"files.{DATA}.size is '1'"),
}


@pytest.mark.parametrize(("change", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(bundle, change, message):
    edit_manifest(bundle, change)
    with pytest.raises(BundleError) as caught:
        load_manifest(bundle)
    assert str(caught.value).startswith("malformed manifest: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith(f"({bundle / FILE_NAME})")


UNSAFE = {
    "no_artifacts": (lambda m: m.update(artifacts=[]), "the manifest lists no artifact"),
    "no_files": (lambda m: m["artifacts"][0].update(files=[]), "artifact onnx vision has no files"),
    "unlisted": (lambda m: m["files"].pop(DATA), f"artifact file '{DATA}' is not among the manifest's files"),
    "parent": (
        lambda m: m["files"].update({"../secret": m["files"][DATA]}),
        "file '../secret' lies outside the bundle",
    ),
    "absolute": (
        lambda m: m["files"].update({"/etc/passwd": m["files"][DATA]}),
        "file '/etc/passwd' lies outside the bundle",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNSAFE.values(), ids=UNSAFE.keys())
def test_inconsistent(bundle, change, message):
    edit_manifest(bundle, change)
    with pytest.raises(BundleError) as caught:
        load_manifest(bundle)
    assert str(caught.value) == f"{message} ({bundle})"


def test_another_version(bundle):
    edit_manifest(bundle, lambda m: m.update(schema_version=99))
    with pytest.raises(BundleError, match="manifest version 99; this tool reads 2") as caught:
        load_manifest(bundle)
    assert "export the bundle again" in str(caught.value.hint)


def test_a_bundle_of_version_1(bundle):
    edit_manifest(bundle, lambda m: m.update(schema_version=1))
    (bundle / FILE_NAME).rename(bundle / "manifest.json")
    with pytest.raises(BundleError, match="a bundle of version 1; this tool reads 2") as caught:
        load_manifest(bundle)
    assert "export the bundle again" in str(caught.value.hint)
    assert is_bundle(bundle)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "other"}', "1" * 5000, "[" * 100_000])
def test_no_manifest_of_ours(bundle, content):
    (bundle / FILE_NAME).write_text(content)
    with pytest.raises(BundleError, match=r"not valid JSON|not a manifest of fastvlm-convert"):
        load_manifest(bundle)
    assert not is_bundle(bundle)


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(BundleError, match=r"not a bundle: it has no fastvlm_manifest.json") as caught:
        load_manifest(tmp_path)
    assert "fastvlm-convert export" in str(caught.value.hint)
    assert not is_bundle(tmp_path)


def test_a_bundle_remains_ours_however_damaged(bundle):
    edit_manifest(bundle, lambda m: m.update(schema_version=99, contract=None))
    (bundle / DATA).unlink()
    assert is_bundle(bundle)


class TestFiles:
    def test_a_missing_file(self, bundle):
        (bundle / DATA).unlink()
        with pytest.raises(BundleError, match=f"'{DATA}' is missing") as caught:
            load_manifest(bundle)
        assert "copy the bundle again" in str(caught.value.hint)

    def test_a_truncated_file(self, bundle):
        content = (bundle / DATA).read_bytes()
        (bundle / DATA).write_bytes(content[:-1])
        message = f"'{DATA}' has {len(content) - 1} bytes, the manifest says {len(content)}"
        with pytest.raises(BundleError, match=message):
            load_manifest(bundle)

    def test_a_changed_byte_is_found_by_its_hash_alone(self, bundle):
        content = bytearray((bundle / DATA).read_bytes())
        content[1000] ^= 1
        (bundle / DATA).write_bytes(content)
        manifest = load_manifest(bundle)
        assert changed_files(bundle, manifest) == [DATA]

    def test_files_that_others_add_do_not_matter(self, bundle):
        (bundle / "mine.md").write_text("mine")
        assert changed_files(bundle, load_manifest(bundle)) == []


def test_a_manifest_is_frozen(fp32_bundle):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_manifest(fp32_bundle).tool = "9"
