"""Real faults in copies of small bundles whose hashes are redone: the catalogue of causes names each."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from fastvlm_convert.io_names import Component
from fastvlm_convert.mil.package import open_package
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.questions import Question
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.verification.bundle import VerifyResult, verify
from fastvlm_convert.verification.causes import CAUSES
from fastvlm_convert.verification.diagnosis import nearest, share_used
from tests.bundles import (
    copy_bundle,
    edit_manifest,
    external_regions,
    graph_path,
    load_graph,
    recipe,
)
from tests.checkpoints import GOLDEN, LLAVA, edit_tensors, golden_cases, read_tensors
from tests.faults import adapt_hashes, edit_coreml_constant, edit_file, edit_onnx_table

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
QUESTIONS = [Question((load_image(c.image),), c.question) for c in golden_cases() if c.name == LLAVA][:1]
SHORT = {"max_new_tokens": 4}
Fault = Callable[[Path], None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    output = tmp_path_factory.mktemp("causes") / "onnx"
    export(CHECKPOINT, output, recipe=recipe(gates=SHORT), targets=["onnx"])
    return output


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
    """Layers of 4 bits that multiply float activations."""
    rules = (QuantizeRule(("decoder.layers.*",), "int4", 16, symmetric=False), QuantizeRule(("*",), "float"))
    gates = {"runtime_max_kl_nats": 1e-7, "identical_text": False, **SHORT}
    settings = recipe("fp32", gates=gates, onnx={"accuracy_level": 0})
    output = tmp_path_factory.mktemp("causes") / "integers"
    export(CHECKPOINT, output, recipe=replace(settings, name="integers", quantize=rules), targets=["onnx"])
    return output


@pytest.fixture
def bundle(exported, tmp_path):
    return copy_bundle(exported, tmp_path)


def run(bundle: Path, checkpoint: Path = CHECKPOINT) -> VerifyResult:
    return verify(bundle, checkpoint, questions=QUESTIONS)


def told(result: VerifyResult) -> dict[str, tuple[str, str | None]]:
    """By target the first stage that breaks, and the cause."""
    return {d.target: (d.stage, d.cause) for d in result.diagnoses}


def edit_contract(**fields) -> Fault:
    return lambda bundle: edit_manifest(bundle, lambda m: m["contract"].update(fields))


def edit_tensor(component: Component, name: str, change: Callable[[np.ndarray], object]) -> Fault:
    """Let `change` alter a float32 tensor in place, in the graph or in its data file."""

    def fault(bundle: Path) -> None:
        model, path = load_graph(bundle, component), graph_path(bundle, component)
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        region = external_regions(model).get(name)
        if region is None:
            values = np.frombuffer(tensor.raw_data, np.float32).reshape(tuple(tensor.dims)).copy()
            change(values)
            tensor.raw_data = values.tobytes()
            path.write_bytes(model.SerializeToString())
        else:
            change(np.memmap(path.parent / region[0], np.float32, "r+", region[1], tuple(tensor.dims)))
        adapt_hashes(bundle)

    return fault


def swap_channels(kernel: np.ndarray) -> None:
    kernel[:] = kernel[:, ::-1].copy()


def reverse_rows(table: np.ndarray) -> None:
    table[:] = table[::-1].copy()


def larger(weights: np.ndarray) -> None:
    weights *= 1.05


def another_prompt(bundle: Path) -> None:
    def change(manifest: dict) -> None:
        contract = manifest["contract"]
        for holder, key in ((contract, "prompt"), (contract["conversation"], "opening")):
            holder[key] = holder[key].replace("helpful", "harmful")

    edit_manifest(bundle, change)


def another_vocabulary(bundle: Path) -> None:
    def change(value: dict) -> None:
        vocab = value["model"]["vocab"]
        a, b = (token for token in vocab if vocab[token] in (258, 261))
        vocab[a], vocab[b] = vocab[b], vocab[a]

    edit_file(bundle, "tokenizer.json", change)


def another_head(bundle: Path) -> None:
    path = graph_path(bundle, "decoder")
    model = onnx.load(path, load_external_data=False)
    (table,) = (t for t in model.graph.initializer if t.name == "lm_head_weight")
    (offset,) = (entry for entry in table.external_data if entry.key == "offset")
    assert int(offset.value) == 0
    width = table.dims[1]
    table.dims[0] -= 1  # all rows but the first, and one that belongs to nobody
    model.graph.initializer.add().CopyFrom(table)
    offset.value = str(4 * width)
    model.graph.initializer[-1].name = "first_row"
    model.graph.initializer[-1].dims[0] = 1
    for tensor in (table, model.graph.initializer[-1]):
        (length,) = (entry for entry in tensor.external_data if entry.key == "length")
        length.value = str(4 * width * tensor.dims[0])
    table.name = "other_rows"
    joined = onnx.helper.make_node("Concat", ["other_rows", "first_row"], ["lm_head_weight"], axis=0)
    model.graph.node.insert(0, joined)
    path.write_bytes(model.SerializeToString())
    adapt_hashes(bundle)


def another_rope_base(bundle: Path) -> None:
    for part, function in (("cos", np.cos), ("sin", np.sin)):

        def change(table: np.ndarray, function=function) -> None:
            exponents = np.arange(table.shape[1]) / table.shape[1]
            table[:] = function(np.outer(np.arange(len(table)), 50.0**-exponents))

        edit_onnx_table(bundle, f"{part}_cache", change)


def short_tables(bundle: Path) -> None:
    def change(table: np.ndarray) -> None:
        table[256:] = table[255:256]

    for part in ("cos", "sin"):
        edit_onnx_table(bundle, f"{part}_cache", change)


FAULTS: dict[str, tuple[Fault, str]] = {
    "image_mode": (edit_contract(image_mode="crop"), "preprocessing"),
    "picture_settings": (edit_contract(image_mean=[0.5, 0.5, 0.5]), "preprocessing"),
    "channels_swapped": (edit_tensor("vision", "stem_0_weight", swap_channels), "image_features"),
    "tokenizer": (another_vocabulary, "preprocessing"),
    "prompt": (another_prompt, "preprocessing"),
    "embedding_table": (edit_tensor("embed", "embed_tokens_weight", reverse_rows), "inputs_embeds"),
    "head_tied": (another_head, "prefill_logits"),
    "rotary_positions": (another_rope_base, "prefill_logits"),
    "layer_weights": (edit_tensor("decoder", "l1_up_weight", larger), "prefill_logits"),
    "late_positions": (short_tables, "context_end"),
}


def test_without_a_fault_there_is_nothing_to_tell(exported):
    result = run(exported)
    assert (result.status, result.diagnoses, result.first_divergence) == ("passed", (), {"onnx": None})
    closest = nearest(result.checks)
    assert closest is not None
    assert share_used(closest) == max(filter(None, map(share_used, result.checks)))
    assert 0 < (share_used(closest) or 0) < 1


@pytest.mark.parametrize("cause", FAULTS)
def test_a_fault_is_named_with_the_stage_that_breaks_first(bundle, cause):
    fault, stage = FAULTS[cause]
    fault(bundle)
    result = run(bundle)
    assert "files" not in {c.stage for c in result.checks if c.status == "failed"}
    assert told(result)["onnx"] == (stage, cause)


def test_the_operation_that_parts_is_named(bundle):
    edit_tensor("vision", "s2b0_fc1_weight", larger)(bundle)
    result = run(bundle)
    parted = result.first_divergence["onnx"]
    assert parted is not None
    assert (parted.stage, parted.layer) == ("image_features", "s2b0_fc1")
    assert "s2b0_fc1 is the first operation that is wrong" in result.diagnoses[-1].text


def test_a_changed_file_and_its_effect_are_told_apart(bundle):
    path = graph_path(bundle, "decoder").parent / "vision_encoder.onnx_data"
    content = bytearray(path.read_bytes())
    content[-20_000:] = bytes(20_000)
    path.write_bytes(content)
    found = told(run(bundle))
    assert found == {"bundle": ("files", "file_changed"), "onnx": ("image_features", "layer_weights")}


@pytest.mark.parametrize(
    ("file", "change", "cause"),
    [
        ("generation_config.json", lambda v: v.update(eos_token_id=[0]), "end_tokens"),
        ("config.json", lambda v: v.update(image_aspect_ratio="square"), "image_mode"),
        ("preprocessor_config.json", lambda v: v.update(image_std=[0.5] * 3), "picture_settings"),
        ("preprocessor_config.json", lambda v: v.update(do_flip_channel_order=True), "channels_swapped"),
        ("tokenizer_config.json", lambda v: v.update(chat_template="{{ messages }}"), "prompt"),
        ("tokenizer.json", lambda v: v["model"]["merges"].pop(), "tokenizer"),
    ],
)
def test_files_that_other_clients_read(bundle, file, change, cause):
    edit_file(bundle, file, change)
    assert told(run(bundle))["bundle"] == (file, cause)


def test_another_reference(exported, llava):
    edit_tensors(llava, {"model.norm.weight": read_tensors(llava)["model.norm.weight"] * 1.01})
    assert told(run(exported, llava))["onnx"] == ("prefill_logits", "another_reference")


def test_a_decoder_of_floats_where_integers_belong(exported, integers, tmp_path):
    """The float decoder under the names of the quantized one."""
    bundle = copy_bundle(integers, tmp_path)
    path, floats = graph_path(bundle, "decoder"), graph_path(exported, "decoder")
    model = onnx.load(floats, load_external_data=False)
    data = path.with_name(f"{path.name}_data")
    parts = [data.read_bytes()]  # the embedding's table may lie in it, too
    starts: dict[str, int] = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry for entry in tensor.external_data}
        if entries and entries["location"].value not in starts:
            starts[entries["location"].value] = sum(map(len, parts))
            parts.append((floats.parent / entries["location"].value).read_bytes())
        if entries:
            offset = starts[entries["location"].value] + int(entries["offset"].value)
            entries["location"].value, entries["offset"].value = data.name, str(offset)
    path.write_bytes(model.SerializeToString())
    data.write_bytes(b"".join(parts))
    adapt_hashes(bundle)
    stage, cause = told(run(bundle))["onnx"]
    assert (stage, cause) == ("prefill_logits", "not_quantized")


def test_a_token_that_does_not_see_itself_is_the_caches_fault(tmp_path):
    """In the function for one token alone, so that the prompt is right."""
    bundle = tmp_path / "coreml"
    export(CHECKPOINT, bundle, recipe=recipe(gates=SHORT), targets=["coreml"])
    package = bundle / "coreml/decoder.mlpackage"
    (path,) = package.glob("Data/*/model.mlmodel")
    spec = open_package(package).spec
    (block,) = spec.mlProgram.functions["decode"].block_specializations.values()
    (mask,) = (o for o in block.operations if o.type == "less_equal")
    mask.type = "less"
    path.write_bytes(spec.SerializeToString())
    adapt_hashes(bundle)
    assert told(run(bundle))["coreml"] == ("decode_logits", "cache")

    shutil.rmtree(bundle)
    export(CHECKPOINT, bundle, recipe=recipe(gates=SHORT), targets=["coreml"])
    edit_coreml_constant(package, "l1_up_weight", larger)
    adapt_hashes(bundle)
    result = run(bundle)
    assert told(result)["coreml"] == ("prefill_logits", "layer_weights")
    assert getattr(result.first_divergence["coreml"], "layer", None) == "l1_up"


def test_int8_activations_where_floats_were_meant(integers, tmp_path):
    """The program is right, and the runtime rounds more than the recipe allows."""
    bundle = copy_bundle(integers, tmp_path)
    assert "onnx" not in told(run(bundle))
    path = graph_path(bundle, "decoder")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 4
    path.write_bytes(model.SerializeToString())
    adapt_hashes(bundle)
    assert told(run(bundle))["onnx"] == ("decoder", "runtime_rounding")

    edit_manifest(bundle, lambda m: m["recipe"]["onnx"].update(accuracy_level=4))
    assert told(run(bundle))["onnx"] == ("end_to_end", "runtime_rounding")


def test_rounding_that_grows_is_no_fault_of_one_operation(tmp_path):
    """Float16 costs this random net more than such a gate allows."""
    bundle = tmp_path / "fp16"
    settings = recipe("fp16", gates={"min_sqnr_db": 65, **SHORT})
    export(CHECKPOINT, bundle, recipe=settings, targets=["onnx"])
    assert told(run(bundle))["onnx"] == ("image_features", "growing_error")


def test_every_cause_is_planted_somewhere():
    elsewhere = {"coarse_recipe", "float16_overflow"}  # test_planted.py
    elsewhere |= {"solved_elsewhere"}  # cli/test_calibration.py
    here = {
        "file_changed", "another_reference", "end_tokens", "not_quantized", "cache", "runtime_rounding",
        "growing_error",
    }  # fmt: skip
    assert set(CAUSES) == {*FAULTS, *here, *elsewhere}
