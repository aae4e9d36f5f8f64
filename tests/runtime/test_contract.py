"""Edited manifests and swapped graphs: a clear error before anything is run."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import Manifest, load_manifest
from fastvlm_convert.pipeline import export
from fastvlm_convert.runtime import coreml_contract, onnx_contract
from fastvlm_convert.runtime.loaded import load_bundle
from tests.bundles import copy_bundle, edit_manifest, recipe
from tests.checkpoints import GOLDEN, LLAVA

TARGETS = ("onnx", "coreml")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """A bundle of both targets; copy it before changing it."""
    output = tmp_path_factory.mktemp("both") / "bundle"
    return export(GOLDEN / LLAVA / "checkpoint", output, recipe=recipe("fp16"), targets=TARGETS).bundle


CHECKS = {"onnx": onnx_contract.check_manifest, "coreml": coreml_contract.check_manifest}


@pytest.fixture
def bundle(both, tmp_path):
    return copy_bundle(both, tmp_path)


def of(manifest, target, component, function=None):
    """One artifact of a parsed manifest."""
    return next(
        a
        for a in manifest["artifacts"]
        if (a["target"], a["component"]) == (target, component) and function in (None, a["function"])
    )


def refusal(both, target, change):
    """What is said of a manifest after a change."""
    value = json.loads((both / "fastvlm_manifest.json").read_text())
    change(value)
    del value["schema"], value["schema_version"]
    manifest = from_plain(Manifest, value)
    with pytest.raises(BundleError) as caught:
        CHECKS[target](manifest)
    assert caught.value.hint
    assert len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_exported_is_right(both, target):
    CHECKS[target](load_manifest(both))


PLACES = [
    (target, component, function, kind)
    for target, component, function in [
        ("onnx", "vision", "main"), ("onnx", "embed", "main"), ("onnx", "embed", "merge"),
        ("onnx", "decoder", "main"),
        ("coreml", "vision", "main"), ("coreml", "embed", "embed"),
        ("coreml", "decoder", "decode"), ("coreml", "decoder", "prefill"),
    ]
    for kind in ("inputs", "outputs")
]  # fmt: skip
EDITS = {
    "renamed": lambda specs: specs[0].update(name="zzz"),
    "another dtype": lambda specs: specs[0].update(dtype="int8"),
    "no dtype at all": lambda specs: specs[0].update(dtype="\ud800"),
    "another rank": lambda specs: specs[0].update(shape=[1, 2, 3, 4, 5, 6]),
    "a negative size": lambda specs: specs[0].update(shape=[-1] * len(specs[0]["shape"] or [0])),
    "no shape": lambda specs: specs[0].update(shape=[], dtype="int64"),
    "left out": lambda specs: specs.pop(0),
    "twice": lambda specs: specs.append(specs[0]),
    "all left out": lambda specs: specs.clear(),
    "one more": lambda specs: specs.append({"name": "x" * 9999, "dtype": "float32", "shape": [1]}),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_edited_inputs_and_outputs(both, place, edit):
    target, component, function, kind = place
    said = refusal(both, target, lambda m: EDITS[edit](of(m, target, component, function)[kind]))
    assert said.startswith("malformed manifest: ")


def swap(target, first, second):
    def change(manifest):
        a, b = of(manifest, target, first), of(manifest, target, second)
        a["component"], b["component"] = second, first

    return change


OTHERS = {
    "vision and decoder swapped": ("onnx", swap("onnx", "vision", "decoder")),
    "vision and embed swapped": ("coreml", swap("coreml", "vision", "embed")),
    "a part missing": ("onnx", lambda m: m["artifacts"].remove(of(m, "onnx", "embed"))),
    "a function missing": ("coreml", lambda m: m["artifacts"].remove(of(m, "coreml", "decoder", "prefill"))),
    "a part twice": ("onnx", lambda m: m["artifacts"].append(of(m, "onnx", "embed"))),
    "another image size": ("onnx", lambda m: m["contract"].update(image_size=320, num_image_tokens=25)),
    "another context": ("coreml", lambda m: m["contract"].update(context_length=1024)),
    "another chunk": ("coreml", lambda m: m["recipe"]["coreml"].update(prefill_chunk=128)),
    "another cache": ("coreml", lambda m: m["recipe"]["coreml"].update(kv_cache="tensors")),
    "other functions": ("coreml", lambda m: m["recipe"]["coreml"].update(sequence_lengths="range")),
    "an end beyond the vocabulary": ("onnx", lambda m: m["contract"].update(eos_token_ids=[512])),
    "widths that differ": (
        "onnx", lambda m: of(m, "onnx", "embed")["outputs"][0].update(shape=["b", "s", 65]),
    ),
    "a cache in another order": (
        "onnx", lambda m: of(m, "onnx", "decoder")["outputs"].reverse(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_artifacts_that_do_not_fit_together(both, case):
    target, change = OTHERS[case]
    assert refusal(both, target, change).startswith("malformed manifest: ")


def replace(bundle: Path, name: str, content: bytes) -> None:
    """Another content for a file, with the size and the hash that belong to it."""
    (bundle / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, lambda m: m["files"].update({name: entry}))


@pytest.mark.parametrize("first", ["vision", "embed", "decoder"])
@pytest.mark.parametrize("second", ["vision", "embed", "decoder"])
def test_a_graph_in_the_place_of_another(bundle, first, second):
    files = {c: of(json.loads((bundle / "fastvlm_manifest.json").read_text()), "onnx", c)["files"][0]
             for c in (first, second)}  # fmt: skip
    replace(bundle, files[first], (bundle / files[second]).read_bytes())
    if first == second:
        load_bundle(bundle, "onnx")
        return
    with pytest.raises(BundleError, match=r"are not what the manifest says|the manifest lists") as caught:
        load_bundle(bundle, "onnx")
    assert caught.value.hint


def test_a_graph_of_another_model(bundle):
    """The names are right, the shapes are not."""
    name = "onnx/vision_encoder_fp16.onnx"
    model = onnx.load(bundle / name, load_external_data=False)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 63
    replace(bundle, name, model.SerializeToString())
    with pytest.raises(
        BundleError, match=r"lists image_features: float32 \[num_image_tokens, 64\], the graph"
    ):
        load_bundle(bundle, "onnx")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"onnx?" * 100], ids=["empty", "zeros", "text"])
@pytest.mark.parametrize("exact", [None, "exact"])
def test_a_graph_that_is_none(bundle, content, exact):
    replace(bundle, "onnx/decoder_model_merged_fp16.onnx", content)
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle, "onnx", exact)
    assert caught.value.hint


@pytest.mark.parametrize(("first", "second"), [("vision", "decoder"), ("decoder", "vision")])
def test_a_package_in_the_place_of_another(bundle, both, first, second):
    source = both / "coreml" / f"{second}.mlpackage"
    target = bundle / "coreml" / f"{first}.mlpackage"
    shutil.rmtree(target)
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file():
            replace(bundle, path.relative_to(bundle).as_posix(), path.read_bytes())
    loaded = load_bundle(bundle, "coreml")
    pixels = np.zeros((1, 3, 256, 256), np.float32)
    with pytest.raises(BundleError, match="the package has no function") as caught:
        loaded.session.encode_image(pixels) if first == "vision" else loaded.session.embed(
            np.zeros(2, np.int64)
        )
    assert caught.value.hint
