"""Faults that clients would suffer from, each in a copy of a bundle whose hashes fit: verify names them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.demo.camera import badly_taken
from fastvlm_convert.demo.samples import held_out
from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.predict.export_plan import plan_export
from fastvlm_convert.questions import Question
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.verification.bundle import VerifyResult, verify
from fastvlm_convert.verification.client_files import check_clients
from tests.bundles import FP16, copy_bundle, edit_manifest, graph_path, recipe
from tests.checkpoints import GOLDEN, LLAVA, golden_cases
from tests.faults import adapt_hashes, edit_coreml_constant, edit_description, edit_file, edit_onnx_table
from tests.planted import DEMO, copy_demo, demo_tensors, plant_residual, questions

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
QUESTIONS = [Question((load_image(c.image),), c.question) for c in golden_cases() if c.name == LLAVA][:1]


@pytest.fixture(scope="module")
def both_targets(tmp_path_factory):
    """The golden checkpoint in float32 for both targets; answers are cut short."""
    output = tmp_path_factory.mktemp("planted") / "both"
    export(CHECKPOINT, output, recipe=recipe(gates={"max_new_tokens": 4}), targets=["onnx", "coreml"])
    return output


@pytest.fixture
def bundle(both_targets, tmp_path):
    return copy_bundle(both_targets, tmp_path)


def run(bundle: Path, checkpoint: Path = CHECKPOINT, asked=QUESTIONS) -> VerifyResult:
    return verify(bundle, checkpoint, questions=asked)


def failed(checks) -> dict[str, str]:
    return {f"{c.target} {c.stage} {c.metric}": str(c.reason) for c in checks if c.status == "failed"}


def client_faults(bundle: Path) -> dict[str, str]:
    """What is found without running a model."""
    manifest = load_manifest(bundle)
    plan = plan_export(open_checkpoint(CHECKPOINT), manifest.recipe, manifest.targets)
    return failed(check_clients(bundle, manifest, plan))


def change(*keys, to):
    def apply(values: dict) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = to

    return apply


def test_nothing_is_wrong_without_a_fault(both_targets):
    result = run(both_targets)
    assert result.status == "passed"
    assert {c.target for c in result.checks if c.stage == "context_end"} == {"onnx", "coreml"}
    # Float16 in this bundle is Core ML's cache, so activations are checked.
    assert [c.threshold for c in result.checks if c.stage == "activations"] == [65504]
    end_to_end = {
        m.target: m for m in result.measurements if (m.stage, m.metric) == ("end_to_end", "sqnr_db")
    }
    assert set(end_to_end) == {"onnx", "coreml"}


@pytest.mark.parametrize(
    ("file", "fault", "reason"),
    [
        (
            "preprocessor_config.json",
            change("do_flip_channel_order", to=True),
            "do_flip_channel_order is true, expected absent",
        ),
        (
            "preprocessor_config.json",
            change("image_mean", to=[0.5] * 3),
            "image_mean[0] is 0.5, expected 0.0",
        ),
        ("preprocessor_config.json", change("image_std", 1, to=0.5), "image_std[1] is 0.5, expected 1.0"),
        ("preprocessor_config.json", change("do_rescale", to=False), "do_rescale is false, expected true"),
        ("preprocessor_config.json", change("crop_size", "width", to=200), "crop_size.width is 200"),
        ("generation_config.json", change("eos_token_id", to=[0]), "eos_token_id[0] is 0, expected"),
        ("config.json", change("eos_token_id", to=[0]), "eos_token_id[0] is 0, expected"),
        ("config.json", change("image_aspect_ratio", to="square"), "is 'square', expected 'pad'"),
        (
            "genai_config.json",
            change("model", "eos_token_id", to=[0]),
            "eos_token_id[0] is 0, expected",
        ),
        ("genai_config.json", change("search", "do_sample", to=True), "search.do_sample is true, expected"),
        ("tokenizer_config.json", change("chat_template", to="{{ messages }}"), "chat_template is"),
        ("tokenizer.json", lambda v: v["model"]["merges"].pop(), "model.merges["),
        ("tokenizer.json", lambda v: v["model"]["merges"].pop(3), "model.merges[3]"),
    ],
)
def test_a_changed_client_file_is_named_with_its_key(bundle, file, fault, reason):
    edit_file(bundle, file, fault)
    found = client_faults(bundle)
    assert list(found) == [f"bundle {file} content"]
    assert reason in found[f"bundle {file} content"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("image_mode", "crop", "image_mode is 'crop', expected 'pad'"),
        ("image_mean", [0.5, 0.5, 0.5], "image_mean[0] is 0.5, expected 0.0"),
        ("image_std", [0.5, 0.5, 0.5], "image_std[0] is 0.5, expected 1.0"),
        ("rescale_factor", 1.0, "rescale_factor is 1.0, expected 0.0039"),
        ("resampling", "nearest", "resampling is 'nearest', expected 'bicubic'"),
        ("image_token_id", 5, "image_token_id is 5, expected"),
        ("eos_token_ids", [7], "eos_token_ids[0] is 7, expected"),
        ("context_length", 1024, "context_length is 1024, expected 2048"),
    ],
)
def test_a_changed_contract_is_named_with_its_field(bundle, field, value, reason):
    edit_manifest(bundle, change("contract", field, to=value))
    found = client_faults(bundle)
    assert list(found) == ["bundle fastvlm_manifest.json contract"]
    assert reason in found["bundle fastvlm_manifest.json contract"]


def test_a_changed_prompt_is_found_however_consistent(bundle):
    """In the conversation and in the single turn, which must agree for the manifest to be read at all."""

    def fault(manifest: dict) -> None:
        contract = manifest["contract"]
        for holder, key in ((contract, "prompt"), (contract["conversation"], "opening")):
            holder[key] = holder[key].replace("helpful", "harmful")

    edit_manifest(bundle, fault)
    reason = client_faults(bundle)["bundle fastvlm_manifest.json contract"]
    assert "conversation.opening is" in reason
    assert "harmful" in reason


def test_a_mode_that_manifest_and_recipe_agree_on_is_found_in_the_files(bundle):
    edit_manifest(bundle, change("contract", "image_mode", to="crop"))
    edit_manifest(bundle, change("recipe", "common", "image_mode", to="crop"))
    found = client_faults(bundle)
    assert set(found) == {"bundle preprocessor_config.json content", "bundle config.json content"}


def test_a_changed_interface_is_named(bundle):
    edit_manifest(bundle, change("artifacts", 0, "inputs", 0, "dtype", to="float16"))
    assert "[0].inputs[0].dtype is" in client_faults(bundle)["bundle fastvlm_manifest.json artifacts"]


def test_a_file_that_clients_would_prefer_is_found(bundle):
    (bundle / "chat_template.jinja").write_text("{{ messages }}")
    adapt_hashes(bundle)
    assert "chat_template.jinja" in client_faults(bundle)["bundle client files foreign"]


def test_a_file_of_another_targets_clients_is_foreign(bundle):
    """onnxruntime-genai would take a bundle without ONNX graphs for one of its own."""
    manifest = load_manifest(bundle)
    plan = plan_export(open_checkpoint(CHECKPOINT), manifest.recipe, ["coreml"])
    assert "genai_config.json" in failed(check_clients(bundle, manifest, plan))["bundle client files foreign"]


def merge_check(bundle: Path):
    adapt_hashes(bundle)
    (check,) = [c for c in run(bundle).checks if c.stage == "merged_embeds"]
    return check


def test_a_graph_that_merges_elsewhere_is_found(bundle):
    path = graph_path(bundle, "embed", "merge")
    model = onnx.load(path, load_external_data=False)
    (token,) = [t for t in model.graph.initializer if t.name == "image_token_id"]
    token.raw_data = np.int64(7).tobytes()
    path.write_bytes(model.SerializeToString())
    check = merge_check(bundle)
    assert (check.status, check.executed_by) == ("not_run", None)
    assert "ScatterND" in str(check.reason)


def test_a_graph_that_reads_another_table_is_found(bundle):
    path = graph_path(bundle, "embed", "merge")
    model = onnx.load(path, load_external_data=False)
    (table,) = [t for t in model.graph.initializer if t.name == "embed_tokens_weight"]
    (offset,) = [entry for entry in table.external_data if entry.key == "offset"]
    offset.value = str(int(offset.value) + 4096)
    path.write_bytes(model.SerializeToString())
    check = merge_check(bundle)
    assert (check.status, check.executed_by) == ("failed", f"onnxruntime {onnxruntime.__version__}")
    assert "rows are not those of embed_tokens" in str(check.reason)


def test_without_the_graph_that_merges_all_else_is_checked(bundle):
    path = graph_path(bundle, "embed", "merge")
    path.write_bytes(b"\xff" * path.stat().st_size)
    check = merge_check(bundle)
    assert (check.status, check.executed_by) == ("not_run", None)
    assert "ONNX Runtime refuses the graph" in str(check.reason)
    assert {c.stage for c in run(bundle).checks if c.status == "not_run"} == {"merged_embeds"}


def test_a_file_of_clients_that_is_gone_is_found(bundle):
    (bundle / "generation_config.json").unlink()
    adapt_hashes(bundle)
    assert "cannot read" in client_faults(bundle)["bundle generation_config.json content"]


def test_cropping_of_both_targets_is_seen_end_to_end(bundle):
    edit_manifest(bundle, change("contract", "image_mode", to="crop"))
    result = run(bundle)
    assert result.status == "failed"
    assert {
        "bundle fastvlm_manifest.json contract",
        "onnx preprocessing sqnr_db",
        "coreml preprocessing sqnr_db",
    } <= set(failed(result.checks))
    # The stages are right, since they get the reference's pixels; the whole is not.
    assert not [name for name in failed(result.checks) if "features" in name or "logits" in name]
    whole = [m.value for m in result.measurements if (m.stage, m.metric) == ("end_to_end", "sqnr_db")]
    assert max(whole) < 60


def test_another_picture_size_is_a_failure_and_no_crash(bundle):
    edit_manifest(bundle, lambda m: m["contract"].update(image_size=320, num_image_tokens=25))
    result = run(bundle)
    assert result.status == "failed"
    assert "bundle fastvlm_manifest.json contract" in failed(result.checks)
    skipped = [c for c in result.checks if c.status == "not_run"]
    assert {"onnx", "coreml"} == {c.target for c in skipped}
    assert "256, 256], expected float32 [any, 3, 320, 320]" in str(skipped[0].reason)


def clamp(table: np.ndarray) -> None:
    table[..., 256:, :] = table[..., 255:256, :]


def shift(table: np.ndarray) -> None:
    table[..., 256:, :] = np.array(table[..., 255:-1, :])


@pytest.mark.parametrize("fault", [clamp, shift])
def test_rotary_tables_wrong_beyond_256_fail_at_the_end_of_the_context(bundle, fault):
    for part in ("cos", "sin"):
        edit_onnx_table(bundle, f"{part}_cache", fault)
        edit_coreml_constant(bundle / "coreml/decoder.mlpackage", f"rotary_{part}", fault)
    adapt_hashes(bundle)
    found = failed(run(bundle).checks)
    assert set(found) == {"onnx context_end sqnr_db", "coreml context_end sqnr_db"}


def test_pictures_in_blue_green_red_fail(bundle):
    def fault(description) -> None:
        image = description.input[0].type.imageType
        image.colorSpace = image.BGR

    edit_description(bundle / "coreml/vision.mlpackage", fault)
    adapt_hashes(bundle)
    found = failed(run(bundle).checks)
    assert "image is 'BGR image, 256 x 256', expected 'RGB image" in found["coreml vision interface"]
    assert "coreml image_features sqnr_db" in found
    assert not [name for name in found if name.startswith("onnx")]


def test_what_a_package_says_of_its_prompt_must_be_right(bundle):
    def fault(description) -> None:
        description.metadata.userDefined["prompt"] = "{question}"

    edit_description(bundle / "coreml/decoder.mlpackage", fault)
    adapt_hashes(bundle)
    (name, reason), *more = failed(run(bundle).checks).items()
    assert (name, more) == ("coreml decoder interface", [])
    assert reason.startswith("prompt is '{question}', expected")


def test_questions_without_pictures_leave_the_encoder_unproven(both_targets):
    result = run(both_targets, asked=[replace(QUESTIONS[0], images=())])
    assert result.status == "not_run"
    skipped = {(c.target, c.stage) for c in result.checks if c.status == "not_run"}
    assert skipped == {(t, s) for t in ("onnx", "coreml") for s in ("preprocessing", "image_features")}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (change("artifacts", to=[]), "the manifest lists no artifact"),
        (
            lambda m: m.update(artifacts=[a for a in m["artifacts"] if a["component"] != "vision"]),
            "the manifest lists no onnx artifact of vision",
        ),
        (change("recipe", "gates", "min_sqnr_db", to=float("nan")), "malformed manifest|not valid JSON"),
    ],
)
def test_a_manifest_that_names_nothing_to_check_is_refused(bundle, fault, message):
    edit_manifest(bundle, fault)
    with pytest.raises(BundleError, match=message):
        load_manifest(bundle)


def test_an_overflow_that_this_processor_hides_fails(tmp_path):
    """ONNX Runtime computes float16 in float32 inside, on x86; sums of 120,000 do it no harm there."""
    checkpoint = copy_demo(tmp_path, plant_residual(demo_tensors()))
    settings = recipe(FP16, gates={"max_new_tokens": 4, "min_sqnr_db": 0, "identical_text": False})
    bundle = tmp_path / "overflow"
    export(checkpoint, bundle, recipe=settings, targets=["onnx"])
    result = run(bundle, checkpoint, questions()[:1])
    found = failed(result.checks)
    assert "l0_residual" in found["bundle activations max_abs"]
    assert result.diagnoses[0].stage == "activations"
    assert {d.cause for d in result.diagnoses} == {"float16_overflow"}
    assert "fastvlm-convert scan CHECKPOINT --recipe fp16 -o" in found["bundle activations max_abs"]

    repaired = replace(settings, repairs=replace(settings.repairs, residual_shift=2))
    export(checkpoint, tmp_path / "repaired", recipe=repaired, targets=["onnx"])
    result = run(tmp_path / "repaired", checkpoint, questions()[:1])
    (check,) = (c for c in result.checks if c.stage == "activations")
    assert check.status == "passed"
    assert check.value == pytest.approx(120_000 / 4, rel=0.1)


@pytest.mark.slow
def test_a_ruined_encoder_fails(tmp_path):
    """Image tokens at 15 dB: each decoder alone is perfect, since it gets the reference's features."""
    rules = (QuantizeRule(("vision.*",), "int4", "channel"), QuantizeRule(("*",), "float"))
    # As whoever ships the demo would set them; a real language model needs wider ones.
    gates = {"quantizer_max_kl_nats": 0.02, "quantizer_min_top1": 0.97}
    settings = replace(recipe("int4", gates=gates), name="ruined", quantize=rules)
    export(DEMO, tmp_path / "bundle", recipe=settings, targets=["onnx", "coreml"])
    asked = [
        Question((badly_taken(sample.image, n),), "Describe the image.")
        for n, sample in enumerate(held_out(10))
    ]
    result = run(tmp_path / "bundle", DEMO, asked)
    assert result.status == "failed"
    assert "is above 0.02" in failed(result.checks)["weights end_to_end kl_mean_nats"]
    assert [(d.target, d.cause) for d in result.diagnoses] == [("weights", "coarse_recipe")]
    staged = {
        m.metric: m.value for m in result.measurements if (m.target, m.stage) == ("weights", "decode_logits")
    }
    assert staged["kl_mean_nats"] < 1e-6


def test_the_document_of_a_contract_is_plain_json(both_targets):
    """The manifest and a plan compare as JSON, in which a tuple is a list."""
    manifest = load_manifest(both_targets)
    plan = plan_export(open_checkpoint(CHECKPOINT), manifest.recipe, manifest.targets)
    assert plan.contract == manifest.contract
    assert failed(check_clients(both_targets, manifest, plan)) == {}
    assert json.loads(manifest.to_json())["contract"]["image_mode"] == "pad"
