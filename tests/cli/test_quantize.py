import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from fastvlm_convert.bench.worker import load, trial
from fastvlm_convert.bundle.folder import new_folder
from fastvlm_convert.checkpoint.quantized_checkpoint import FILE_NAME, read_record
from fastvlm_convert.errors import OutputError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.recipe_settings import QuantizeRule
from tests.bundles import MIXED_RULES, mixed_recipe, write_recipe
from tests.checkpoints import edit_json, tree_state
from tests.cli.conftest import CHECKPOINT, IMAGE


@pytest.fixture
def mixed(tmp_path):
    """The recipe of `golden_quantized` as a file."""
    return write_recipe(mixed_recipe(), tmp_path / "mixed.yaml")


def content(folder):
    return {name: digest for name, (digest, _) in tree_state(folder).items()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestWhatItSays:
    def test_table(self, cli, mixed, tmp_path, golden_quantized):
        output = tmp_path / "it's quantized"
        result = cli("quantize", CHECKPOINT, "--recipe", mixed, "-o", output)
        assert result.code == 0
        rows = {line.split()[0]: line for line in result.out.splitlines() if line}
        assert {"component", "vision", "projector", "decoder", "embedding", "total"} <= set(rows)
        assert "12 int4 block 16, asymmetric" in rows["decoder"]
        assert "2 float" in rows["decoder"]
        assert "decoder.layers.0.mlp.down_proj, decoder.layers.1.mlp.down_proj: rule '*.down_proj'" in (
            " ".join(result.out.split())
        )
        assert "9.00" in rows["embedding"]  # 8 bits and a float16 scale for each block of 16
        assert "peak memory" in result.out
        (line,) = [line for line in result.err.splitlines() if line.startswith("export: ")]
        assert shlex.split(line)[2:4] == ["export", str(output)]
        assert content(output) == content(golden_quantized)
        assert names(tmp_path) == ["it's quantized", "mixed.yaml"]

    def test_smaller_blocks_say_why(self, cli, tmp_path):
        made = ("quantize", CHECKPOINT, "--recipe", "int8", "-o", tmp_path / "out")
        reason = "its width 176 is no multiple of block_size 32, so 16"
        assert f"decoder.layers.1.mlp.down_proj: {reason}" in " ".join(cli(*made).out.split())
        document = cli("inspect", tmp_path / "out", "--json").document["quantized"]
        fitted = {c["name"]: c["fitted"] for c in document["components"]}["decoder"]
        assert fitted == {f"decoder.layers.{i}.mlp.down_proj": reason for i in range(2)}

    def test_document(self, cli, mixed, tmp_path):
        output = tmp_path / "out"
        result = cli("quantize", CHECKPOINT, "--recipe", mixed, "-o", output, "--json")
        document = result.document
        assert (result.code, result.err) == (0, "")
        assert (document["command"], document["status"], document["resumed_weights"]) == (
            "quantize",
            "passed",
            0,
        )
        assert document["total_bytes"] == sum(p.stat().st_size for p in output.iterdir())
        assert [stage["stage"] for stage in document["stages"]] == ["hashes", "weights"]
        peaks = [stage["peak_memory_bytes"] for stage in document["stages"]]
        assert 1e6 < max(peaks) == document["peak_memory_bytes"] < 4e9
        components = {c["name"]: c for c in document["components"]}
        record = read_record(output)
        assert components["total"]["num_layers"] == len(record.layers) == len(document["layers"])
        assert sum(c["stored_bytes"] for n, c in components.items() if n != "total") == pytest.approx(
            components["total"]["stored_bytes"], abs=4
        )
        assert components["decoder"]["in_float"] == {
            f"decoder.layers.{i}.mlp.down_proj": "rule '*.down_proj'" for i in range(2)
        }
        assert "no multiple of block_size 64" in str(components["vision"]["in_float"])
        for component in components.values():
            assert 10 < component["sqnr_db"] < 60

    def test_inspect(self, cli, golden_quantized):
        result = cli("inspect", golden_quantized)
        record = read_record(golden_quantized)
        assert record.source.sha256 in result.out
        assert "recipe mixed" in result.out
        assert "12 int4 block 16, asymmetric" in result.out
        document = cli("inspect", golden_quantized, "--json").document
        assert document["quantized"]["source"]["sha256"] == record.source.sha256
        assert document["quantized"]["recipe"]["name"] == "mixed"
        assert len(document["quantized"]["layers"]) == len(record.layers)
        original = cli("inspect", CHECKPOINT, "--json").document
        assert original["quantized"] is None
        assert document["decoder"] == original["decoder"]
        assert document["parameters"]["decoder"] == original["parameters"]["decoder"]


class TestOtherCommands:
    def test_run(self, cli, golden_quantized):
        result = cli("run", golden_quantized, IMAGE, "What is this?", "--max-new-tokens", 3, "--json")
        assert result.code == 0
        assert result.document["executed_by"].startswith("torch")

    def test_export_is_the_direct_one(self, cli, golden_quantized, mixed, tmp_path):
        targets = ("--target", "onnx", "--target", "coreml")
        assert cli("export", golden_quantized, *targets, "-o", tmp_path / "a").code == 0
        assert cli("export", golden_quantized, *targets, "--recipe", mixed, "-o", tmp_path / "b").code == 0
        assert cli("export", CHECKPOINT, *targets, "--recipe", mixed, "-o", tmp_path / "c").code == 0
        assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")

    def test_export_reports_the_same_layers(self, cli, golden_quantized, mixed, tmp_path):
        onnx = ("--target", "onnx", "--json", "-o")
        stored = cli("export", golden_quantized, *onnx, tmp_path / "a").document
        direct = cli("export", CHECKPOINT, "--recipe", mixed, *onnx, tmp_path / "b").document
        assert stored["layers"] == direct["layers"]
        assert stored["components"] == direct["components"]

    def test_export_with_other_sections_of_the_recipe(self, cli, golden_quantized, tmp_path):
        settings = replace(mixed_recipe(), name="long", common=replace(mixed_recipe().common, image_size=320))
        path = write_recipe(settings, tmp_path / "long.yaml")
        assert (
            cli("export", golden_quantized, "--target", "onnx", "--recipe", path, "-o", tmp_path / "a").code
            == 0
        )
        manifest = load_manifest(tmp_path / "a")
        assert (manifest.recipe.name, manifest.contract.image_size) == ("long", 320)

    @pytest.mark.parametrize("name", ["fp32", "int4"])
    def test_export_with_other_integers_is_refused(self, cli, golden_quantized, tmp_path, name):
        result = cli("export", golden_quantized, "--target", "onnx", "--recipe", name, "-o", tmp_path / "a")
        assert result.code == 2
        assert f"whose quantize section differs from that of recipe '{name}'" in result.err
        assert "hint: leave --recipe out" in result.err
        assert names(tmp_path) == []

    def test_verify(self, cli, golden_quantized, tmp_path, pictures):
        assert cli("export", golden_quantized, "--target", "onnx", "-o", tmp_path / "a").code == 0
        ask = ("verify", tmp_path / "a", "--images", pictures, "--json", "--reference")
        ours, floats = cli(*ask, golden_quantized), cli(*ask, CHECKPOINT)
        assert (floats.document["warnings"], ours.document["warnings"]) == ([], [])
        assert "not_run" not in {c["status"] for c in floats.document["checks"]}
        skipped = [c for c in ours.document["checks"] if c["status"] == "not_run"]
        assert [c["target"] for c in skipped] == ["weights", "weights"]
        assert "give the float checkpoint it was made from" in skipped[0]["reason"]
        rest = [c for c in ours.document["checks"] if c["target"] == "onnx"]
        assert {c["status"] for c in rest} == {"passed"}
        assert ours.code == 2  # not everything could be run

    def test_verify_says_once_what_it_cannot_tell(self, cli, golden_quantized, tmp_path, pictures):
        assert cli("export", golden_quantized, "--target", "onnx", "-o", tmp_path / "a").code == 0
        ask = ("verify", tmp_path / "a", "--images", pictures, "--reference", golden_quantized)
        result = cli(*ask, "--details")
        assert result.err.count("the reference is quantized itself") == 1
        (row,) = [line for line in result.out.splitlines() if "top1_agreement" in line]
        assert row.split() == ["weights", "end_to_end", "top1_agreement", "-", "-", "not_run"]

    def test_verify_of_another_recipe_is_refused(self, cli, golden_quantized, fp32_bundle):
        result = cli("verify", fp32_bundle, "--reference", golden_quantized)
        assert result.code == 2
        assert "differs from that of recipe 'fp32'" in result.err

    def test_bench(self, golden_quantized):
        """What a process of `bench` does; starting one would only add seconds."""
        request = {
            "kind": "checkpoint",
            "path": str(golden_quantized),
            "image_size": 256,
            "context_length": 128,
        }
        assert trial(load(request), "Hi", 2)["decode_tokens_per_s"] > 0


class TestRefused:
    @pytest.mark.parametrize(
        ("checkpoint", "recipe", "message"),
        [
            ("quantized", "mixed", "the checkpoint is quantized already"),
            ("float", "fp16", "recipe 'fp16' quantizes no layer"),
            ("none", "int4", "there is no such checkpoint"),
        ],
    )
    def test_input(self, cli, golden_quantized, mixed, tmp_path, checkpoint, recipe, message):
        folder = {"quantized": golden_quantized, "float": CHECKPOINT, "none": tmp_path / "none"}[checkpoint]
        chosen = mixed if recipe == "mixed" else recipe
        result = cli("quantize", folder, "--recipe", chosen, "-o", tmp_path / "out")
        assert result.code == 2
        assert message in result.err
        assert names(tmp_path) == ["mixed.yaml"]

    def test_an_adapter_for_integers(self, cli, golden_quantized, tmp_path):
        result = cli("run", golden_quantized, "Hi", "--adapter", tmp_path)
        assert result.code == 2
        assert "cannot be merged into quantized weights" in result.err

    def test_an_existing_output(self, cli, golden_quantized, mixed, tmp_path):
        output = tmp_path / "out"
        quantize = ("quantize", CHECKPOINT, "--recipe", mixed, "-o", output)
        assert cli(*quantize).code == 0
        edit_json(output / FILE_NAME, {"tool": "old"})
        before = tree_state(output)
        assert "add --overwrite to replace it" in cli(*quantize).err
        assert tree_state(output) == before
        assert cli(*quantize, "--overwrite").code == 0
        assert content(output) == content(golden_quantized)
        assert names(tmp_path) == ["mixed.yaml", "out"]

    def test_overwrite_replaces_nothing_else(self, cli, mixed, fp32_bundle, tmp_path, golden_quantized):
        result = cli("quantize", CHECKPOINT, "--recipe", mixed, "-o", fp32_bundle, "--overwrite")
        assert (result.code, "no quantized checkpoint of this tool" in result.err) == (2, True)
        load_manifest(fp32_bundle)
        with pytest.raises(OutputError, match="no bundle"), new_folder(golden_quantized, True, []):
            pass


# Stops after some weights, until a signal comes.
WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from fastvlm_convert.bundle.resumable import Work
from fastvlm_convert.cli.main import main

finish = Work.finish

def wait(self, step, notes):
    finish(self, step, notes)
    if len(self.finished) == 40:
        print("ready", flush=True)
        time.sleep(60)

Work.finish = wait
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_an_interrupted_run_goes_on(cli, golden_quantized, mixed, tmp_path, number, code):
    output = tmp_path / "out"
    arguments = ["quantize", CHECKPOINT, "--recipe", mixed, "-o", output]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    busy = cli(*arguments)
    assert (busy.code, "another run is working here" in busy.err) == (2, True)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert ("the same command resumes from" in errors) == (number != signal.SIGKILL)
    assert names(tmp_path) == ["mixed.yaml", "out.partial"]
    inode = (tmp_path / "out.partial" / "model.safetensors").stat().st_ino
    result = cli(*arguments, "--json")
    assert (result.code, result.document["resumed_weights"]) == (0, 40)
    assert (output / "model.safetensors").stat().st_ino == inode
    assert content(output) == content(golden_quantized)
    assert names(tmp_path) == ["mixed.yaml", "out"]


def test_another_recipe_does_not_go_on(cli, mixed, tmp_path):
    output = tmp_path / "out"
    arguments = ["quantize", CHECKPOINT, "--recipe", mixed, "-o", output]
    process = subprocess.Popen([sys.executable, "-c", WAITING, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    rules = (QuantizeRule(("*.q_proj", "*.k_proj", "*.v_proj"), "int8"), *MIXED_RULES)
    write_recipe(replace(mixed_recipe(), quantize=rules), mixed)
    result = cli(*arguments, "--json")
    assert (result.code, result.document["resumed_weights"]) == (0, 0)
    schemes = {layer["layer"]: layer["scheme"] for layer in json.loads(result.out)["layers"]}
    assert schemes["decoder.layers.0.self_attn.q_proj"] == "int8"


def test_going_on_is_said(cli, mixed, tmp_path):
    arguments = ["quantize", CHECKPOINT, "--recipe", mixed, "-o", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, "-c", WAITING, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    assert "resumed an interrupted run, which had written 40 weights" in cli(*arguments).err
