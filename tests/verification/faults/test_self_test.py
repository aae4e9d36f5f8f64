"""Known faults in copies of a bundle: each fails a check, that of the stage it is in."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_convert.errors import ImageError
from fastvlm_convert.manifest import file_entries
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.questions import Question, hard_questions
from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.catalogue import FAULTS
from fastvlm_convert.verification.faults.fault import BUNDLE, EVERY_TARGET, Fault
from fastvlm_convert.verification.faults.self_test import SelfTest, self_test
from tests.bundles import copy_bundle, edit_manifest, mixed_recipe, recipe
from tests.checkpoints import GOLDEN, LLAVA, golden_cases
from tests.planted import DEMO

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
QUESTIONS = [Question((load_image(c.image),), c.question) for c in golden_cases() if c.name == LLAVA]
BY_ID = {fault.id: fault for fault in FAULTS}
QUALITY = Path(__file__).parents[3] / "docs" / "quality.md"

# Stage and metric of the first check that fails.
EXPECTED = {
    ("merge-dropped", "bundle"): ("tokenizer.json", "content"),
    ("eos", "bundle"): ("fastvlm_manifest.json", "contract"),
    ("channels-swapped", "onnx"): ("image_features", "sqnr_db"),
    ("channels-swapped", "coreml"): ("image_features", "sqnr_db"),
    ("nibbles-swapped", "onnx"): ("prefill_logits", "sqnr_db"),
    ("nibbles-swapped", "coreml"): ("prefill_logits", "sqnr_db"),
    ("rotary-beyond-256", "onnx"): ("context_end", "sqnr_db"),
    ("rotary-beyond-256", "coreml"): ("context_end", "sqnr_db"),
    ("position-off-by-one", "onnx"): ("decode_logits", "sqnr_db"),
    ("position-off-by-one", "coreml"): ("decode_logits", "sqnr_db"),
    ("accuracy-level", "onnx"): ("decoder", "accuracy_level"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Integers of every kind for both targets; answers are cut short."""
    output = tmp_path_factory.mktemp("self-test") / "mixed"
    settings = mixed_recipe()
    settings = replace(settings, gates=replace(settings.gates, max_new_tokens=4))
    export(CHECKPOINT, output, recipe=settings, targets=["onnx", "coreml"])
    return output


def break_embedding(copy: Copy) -> None:
    name = copy.manifest.artifact("onnx", "embed").files[0]
    copy.owned(name).write_bytes(b"\xff" * 8)


HARMLESS = Fault("harmless", "all is well", {EVERY_TARGET: lambda copy: None, BUNDLE: lambda copy: None})
BROKEN = Fault("broken", "a graph cannot be read", {"onnx": break_embedding})


@pytest.fixture(scope="module")
def tested(bundle) -> SelfTest:
    before = file_entries(bundle)
    names = dict.fromkeys(fault for fault, _ in EXPECTED)
    result = self_test(
        bundle, CHECKPOINT, QUESTIONS, faults=[*(BY_ID[name] for name in names), HARMLESS, BROKEN]
    )
    assert file_entries(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]
    return result


def gates(result: SelfTest) -> dict[tuple[str, str], tuple[str, str]]:
    """Stage and metric that caught each fault."""
    caught = (p for p in result.planted if p.fate == "caught")
    return {(p.fault, p.target): (p.checks[0].stage, p.checks[0].metric) for p in caught}


def test_each_fault_fails_the_check_of_its_own_stage(tested):
    assert gates(tested) == EXPECTED
    assert {check.status for check in tested.control} == {"passed"}


def test_what_a_bundle_has_no_place_for_is_said(tested):
    (skipped,) = (p for p in tested.planted if p.fate == "not_applicable")
    assert (skipped.fault, skipped.target, skipped.checks) == ("accuracy-level", "coreml", ())
    assert skipped.reason == "its operations have no such setting"


def test_a_fault_that_no_check_notices_is_missed(tested):
    missed = {p.target: p.reason for p in tested.planted if p.fault == "harmless" and p.fate == "missed"}
    assert missed == dict.fromkeys(("bundle", "onnx", "coreml"), "every check passed")
    assert tested.status == "failed"
    caught = tuple(p for p in tested.planted if p.fate != "missed")
    assert replace(tested, planted=caught).status == "passed"


def test_a_fault_that_keeps_a_target_from_running_is_missed_too(tested):
    """`verify` would end with exit code 2: no gate has failed."""
    (planted,) = (p for p in tested.planted if p.fault == "broken")
    assert planted.fate == "missed"
    assert str(planted.reason).startswith("could not be run: ONNX Runtime refuses the graph")


def test_faults_are_not_planted_in_a_bundle_that_fails_by_itself(bundle, tmp_path):
    broken = copy_bundle(bundle, tmp_path)
    edit_manifest(broken, lambda manifest: manifest["contract"].update(rescale_factor=1.0))
    result = self_test(broken, CHECKPOINT, QUESTIONS)
    assert (result.status, result.planted) == ("failed", ())
    assert "rescale_factor is 1.0" in str(next(c.reason for c in result.control if c.status == "failed"))


def test_without_a_picture_there_is_nothing_to_plant_with(bundle):
    with pytest.raises(ImageError, match="no pictures to plant"):
        self_test(bundle, CHECKPOINT, [Question((), "Hello?")])


def test_without_a_runtime_nothing_is_claimed_of_its_target(bundle, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastvlm_convert.runtime.onnx_session", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    faults = [BY_ID["eos"], BY_ID["prompt-order"]]
    result = self_test(bundle, CHECKPOINT, QUESTIONS, faults=faults)
    assert result.status == "not_run"
    caught = {(p.fault, p.target, p.fate) for p in result.planted}
    assert caught == {("eos", "bundle", "caught"), ("prompt-order", "coreml", "caught")}


def documented() -> dict[tuple[str, str], tuple[str, str]]:
    """The rows of the table in docs/quality.md: stage and metric by fault and place."""
    page = QUALITY.read_text(encoding="utf-8")
    section = page.partition("## Gates that can fail")[2].partition("\n## ")[0]
    row = r"^\| `([\w-]+)` \| .*? \| ([\w, ]+) \| `([\w.]+)` \| `(\w+)` \|$"
    rows = re.findall(row, section, re.MULTILINE)
    return {(row[0], where): (row[2], row[3]) for row in rows for where in row[1].split(", ")}


def test_the_page_lists_every_fault():
    assert {fault for fault, _ in documented()} == set(BY_ID)


@pytest.mark.slow
def test_every_fault_of_the_demo_is_caught_as_the_page_says(tmp_path):
    output = tmp_path / "int4"
    export(DEMO, output, recipe="int4", targets=["onnx", "coreml"])
    result = self_test(output, DEMO, hard_questions())
    assert [p for p in result.planted if p.fate == "missed"] == []
    # The one is ONNX's, the other needs integer activations.
    skipped = {p.fault for p in result.planted if p.fate == "not_applicable"}
    assert skipped == {"accuracy-level", "activation-scale"}
    caught = gates(result)
    assert caught == {key: check for key, check in documented().items() if key[0] != "activation-scale"}
    targets = [target for _, target in caught]
    assert (targets.count("bundle"), targets.count("onnx"), targets.count("coreml")) == (9, 18, 19)


@pytest.mark.slow
def test_a_wrong_scale_of_activations_is_caught_as_the_page_says(tmp_path):
    settings = recipe("int8-static", calibration={"num_samples": 4})
    export(DEMO, tmp_path / "static", recipe=settings, targets=["onnx", "coreml"])
    result = self_test(tmp_path / "static", DEMO, hard_questions()[:2], faults=[BY_ID["activation-scale"]])
    assert {p.fate for p in result.planted} == {"caught"}
    assert gates(result) == {
        key: check for key, check in documented().items() if key[0] == "activation-scale"
    }
