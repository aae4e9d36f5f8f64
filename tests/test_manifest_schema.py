"""The schema that is published is the code's, and takes the manifests that exports write."""

import copy
import json

import pytest

from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import FILE_NAME, manifest_of
from fastvlm_convert.manifest_schema import manifest_schema
from fastvlm_convert.pipeline import export
from tests.checkpoints import GOLDEN, HF, LLAVA
from tests.published_schema import PATH
from tests.schema import problems

jsonschema = pytest.importorskip("jsonschema")
VALIDATOR = jsonschema.Draft202012Validator(json.loads(PATH.read_text()))


def errors(value: object) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(value)]


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(manifest_schema())


@pytest.mark.parametrize(
    ("name", "recipe", "targets"),
    [(LLAVA, "fp32", "onnx"), (HF, "fp16", ["onnx", "coreml"]), (LLAVA, "int8", "coreml")],
)
def test_manifests_of_exports_are_valid(tmp_path, name, recipe, targets):
    export(GOLDEN / name / "checkpoint", tmp_path / "bundle", recipe=recipe, targets=targets)
    assert errors(json.loads((tmp_path / "bundle" / FILE_NAME).read_text())) == []


CHANGES = {
    "unknown key": lambda m: m.update(more=1),
    "missing key": lambda m: m.pop("tool"),
    "version": lambda m: m.update(schema_version=1),
    "schema": lambda m: m.update(schema="another"),
    "type": lambda m: m["contract"].update(image_size="256"),
    "choice": lambda m: m["contract"].update(image_mode="stretch"),
    "target": lambda m: m["artifacts"][0].update(target="tflite"),
    "entry": lambda m: m["files"]["config.json"].pop("sha256"),
    "setting": lambda m: m["recipe"]["common"].update(max_context_length=1),
    "null": lambda m: m["source"].update(sha256=None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_and_the_loader_refuse_the_same(fp32_bundle, name):
    value = json.loads((fp32_bundle / FILE_NAME).read_text())
    manifest_of(copy.deepcopy(value), PATH)
    assert errors(value) == []
    CHANGES[name](value)
    assert errors(value)
    with pytest.raises(BundleError):
        manifest_of(value, PATH)


def test_null_is_a_type_of_its_own(fp32_bundle):
    value = json.loads((fp32_bundle / FILE_NAME).read_text())
    assert value["source"]["calibration"] is None
    value["source"]["calibration"] = 3
    assert errors(value)


def test_our_own_reading_of_schemas_agrees(fp32_bundle):
    assert list(problems(manifest_schema()["properties"]["recipe"], {}))
