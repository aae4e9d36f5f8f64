import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.recipe import shipped_recipes
from tests.bundles import copy_bundle, edit_manifest, mixed_recipe, write_recipe
from tests.checkpoints import copy_checkpoint, edit_json, tree_state
from tests.cli.conftest import CHECKPOINT, read_all

ARGUMENTS = ("--target", "onnx", "--recipe", "fp32", "-o")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_says_what_it_made_and_what_to_do_next(cli, tmp_path):
    output = tmp_path / "bundle"
    result = cli("export", CHECKPOINT, *ARGUMENTS, output)
    assert result.code == 0
    manifest = load_manifest(output)
    assert all(name in result.out for name in manifest.files)
    assert "total" in result.out
    lines = [line.split() for line in result.out.splitlines()]
    costs = lines[lines.index(["stage", "seconds", "CPU", "seconds", "peak", "memory"]) + 1 :]
    assert [line[0] for line in costs] == ["hashes", "onnx", "bundle", "total"]
    assert all(float(line[1]) >= 0 and line[-1] in {"MB", "GB"} for line in costs)
    assert result.err == (
        "warning: the checkpoint has no license file; see that you may pass the bundle on\n\n"
        f"verify: fastvlm-convert verify {output} --reference {CHECKPOINT}\n"
        f"bench:  fastvlm-convert bench {output} --reference {CHECKPOINT}\n"
    )
    assert names(tmp_path) == ["bundle"]


def test_document(cli, tmp_path):
    output = tmp_path / "bundle"
    result = cli("export", CHECKPOINT, *ARGUMENTS, output, "--json")
    assert (result.code, result.err) == (0, "")
    manifest = load_manifest(output)
    files = {name: entry.size for name, entry in manifest.files.items()}
    document = result.document
    assert document.pop("answers")["status"] == "not_run"
    stages = document.pop("stages")
    assert [stage["stage"] for stage in stages] == ["hashes", "onnx", "bundle"]
    assert all(stage["seconds"] > 0 and stage["cpu_seconds"] >= 0 for stage in stages)
    peak = document.pop("peak_memory_bytes")
    assert peak == max(stage["peak_memory_bytes"] for stage in stages) > sum(files.values())
    assert {layer["scheme"] for layer in document.pop("layers")} == {"float"}
    assert [c["name"] for c in document.pop("components")] == [
        "vision", "projector", "decoder", "embedding", "total",
    ]  # fmt: skip
    assert document == {
        "schema": "fastvlm-convert/export",
        "schema_version": 1,
        "command": "export",
        "status": "passed",
        "bundle": str(output),
        "files": files,
        "total_bytes": sum(files.values()),
        "cache": {},
        "activations": None,
        "warnings": ["the checkpoint has no license file; see that you may pass the bundle on"],
        "findings": [],
    }


def test_the_commands_it_prints_can_be_pasted(cli, tmp_path):
    checkpoint = tmp_path / "my [bold]model"
    shutil.copytree(CHECKPOINT, checkpoint)
    output = tmp_path / "it's a :bundle:"
    result = cli("export", checkpoint, *ARGUMENTS, output)
    assert result.code == 0
    (line,) = (line for line in result.err.splitlines() if line.startswith("verify: "))
    assert shlex.split(line)[2:] == ["verify", str(output), "--reference", str(checkpoint)]


def test_a_target_named_twice_is_exported_once(cli, tmp_path):
    result = cli("export", CHECKPOINT, "--target", "onnx", *ARGUMENTS, tmp_path / "b")
    assert result.code == 0
    assert len(load_manifest(tmp_path / "b").artifacts) == 4


def test_a_recipe_of_ones_own(cli, tmp_path):
    recipe = tmp_path / "mine.yaml"
    text = shipped_recipes()["fp32"].read_text().replace("name: fp32", "name: mine")
    recipe.write_text(text.replace("image_size: checkpoint", "image_size: 320"))
    result = cli("export", CHECKPOINT, "--target", "onnx", "--recipe", recipe, "-o", tmp_path / "b")
    assert result.code == 0
    manifest = load_manifest(tmp_path / "b")
    assert (manifest.recipe.name, manifest.contract.image_size) == ("mine", 320)


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_the_checkpoint_is_only_read(cli, llava, tmp_path, json_flag):
    before = tree_state(llava)
    assert cli("export", llava, *ARGUMENTS, tmp_path / "b", *json_flag).code == 0
    assert cli("verify", tmp_path / "none", "--reference", llava).code == 2
    assert cli("run", llava, "Hi", "--max-new-tokens", 1).code == 0
    assert tree_state(llava) == before


class TestOverwrite:
    @pytest.fixture
    def old(self, fp32_bundle, tmp_path):
        """A bundle in the way, a file of which shows whether it was replaced."""
        folder = tmp_path / "work"
        folder.mkdir()
        bundle = copy_bundle(fp32_bundle, folder)
        (bundle / "config.json").write_text("old")
        return bundle

    def export(self, cli, output, *more, checkpoint=CHECKPOINT):
        return cli("export", checkpoint, *ARGUMENTS, output, *more)

    def test_an_existing_output_names_the_flag(self, cli, old):
        before = tree_state(old)
        result = self.export(cli, old)
        assert (result.code, result.out) == (2, "")
        assert result.err == f"error: the output exists ({old})\nhint: add --overwrite to replace it\n"
        assert tree_state(old) == before

    def test_a_bundle_is_replaced(self, cli, old):
        assert self.export(cli, old, "--overwrite").code == 0
        assert (old / "config.json").read_text() != "old"
        load_manifest(old)
        assert names(old.parent) == ["bundle"]

    @pytest.mark.parametrize("damage", ["version", "missing_file", "malformed"])
    def test_a_damaged_bundle_is_replaced_too(self, cli, old, damage):
        if damage == "missing_file":
            (old / "config.json").unlink()
        else:
            change = {"schema_version": 99} if damage == "version" else {"contract": None}
            edit_manifest(old, lambda m: m.update(change))
        assert self.export(cli, old, "--overwrite").code == 0
        load_manifest(old)

    @pytest.mark.parametrize("command", ["export", "quantize"])
    def test_files_of_the_user_are_listed_and_stay(
        self, cli, old, golden_quantized, tmp_path, pictures, command
    ):
        """A recipe, calibration pictures and notes in the folder that --overwrite would replace."""
        made = old if command == "export" else Path(shutil.copytree(golden_quantized, tmp_path / "made"))
        shutil.move(pictures, made / "pictures")
        recipe = write_recipe(mixed_recipe(), made / "mine.yaml")
        (made / "link").symlink_to("pictures")
        (made / ".DS_Store").write_bytes(b"the Finder's")
        (made / "empty").mkdir()
        before = tree_state(made)
        target = ("--target", "onnx") if command == "export" else ()
        argv = (command, CHECKPOINT, *target, "--recipe", recipe, "-o", made, "--overwrite")
        result = cli(*argv)
        assert result.code == 2
        for name in ("link", "mine.yaml", "pictures/image0.png", "pictures/questions.json"):
            assert name in result.err.splitlines()[0]
        assert "DS_Store" not in result.err
        assert tree_state(made) == before
        for name in ("link", "mine.yaml"):
            (made / name).rename(tmp_path / name)
        shutil.move(made / "pictures", tmp_path)
        assert cli(*(tmp_path / "mine.yaml" if part == recipe else part for part in argv)).code == 0
        assert not (made / ".DS_Store").exists()

    def test_nothing_to_overwrite_is_fine(self, cli, tmp_path):
        assert self.export(cli, tmp_path / "new" / "bundle", "--overwrite").code == 0

    @pytest.mark.parametrize(
        "content", [None, "", "{", '{"name": "my web app"}', '{"schema": "other/bundle"}', "[]"]
    )
    def test_a_folder_without_our_manifest_is_not_replaced(self, cli, tmp_path, content):
        folder = tmp_path / "work" / "site"
        folder.mkdir(parents=True)
        (folder / "precious.txt").write_text("mine")
        if content is not None:
            (folder / "fastvlm_manifest.json").write_text(content)
        before = tree_state(folder)
        result = self.export(cli, folder, "--overwrite")
        assert (result.code, result.out) == (2, "")
        assert "the output is no bundle of this tool, so --overwrite does not replace it" in result.err
        assert "hint: delete it yourself, or choose another folder" in result.err
        assert tree_state(folder) == before
        assert names(folder.parent) == ["site"]

    def test_an_empty_folder_is_not_replaced(self, cli, tmp_path):
        assert self.export(cli, tmp_path, "--overwrite").code == 2

    def test_a_file_is_not_replaced(self, cli, tmp_path):
        (tmp_path / "file").write_text("mine")
        assert self.export(cli, tmp_path / "file", "--overwrite").code == 2
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("flag", [[], ["--overwrite"]])
    @pytest.mark.parametrize("dangling", [True, False])
    def test_a_link_is_not_replaced(self, cli, old, tmp_path, flag, dangling):
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "nowhere" if dangling else old)
        before = tree_state(old)
        result = self.export(cli, link, *flag)
        assert result.code == 2
        assert result.err == f"error: the output is a link ({link})\nhint: give the folder itself\n"
        assert link.is_symlink()
        assert tree_state(old) == before

    @pytest.mark.parametrize("flag", [[], ["--overwrite"]])
    @pytest.mark.parametrize("where", [".", "..", "../..", "inside", "link"])
    def test_the_checkpoint_is_safe(self, cli, fp32_bundle, tmp_path, flag, where):
        """Even where its folder, or one above it, looks like a bundle of ours."""
        checkpoint = copy_checkpoint("tiny-llava", tmp_path / "a" / "b")
        for folder in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
            shutil.copy(fp32_bundle / "fastvlm_manifest.json", folder)
        (tmp_path / "link").symlink_to(checkpoint.parent)
        output = tmp_path / "link" if where == "link" else checkpoint / where
        before = tree_state(tmp_path / "a")
        result = self.export(cli, output, *flag, checkpoint=checkpoint)
        assert (result.code, result.out) == (2, "")
        assert "the output holds an input or lies inside one" in result.err or where == "link"
        assert tree_state(tmp_path / "a") == before

    def test_the_old_bundle_stays_when_the_new_export_fails(self, cli, old, llava):
        content = bytearray((llava / "model.safetensors").read_bytes())
        content[-64:] = b"\xff" * 64  # NaN in the tensor that is read last or nearly so
        (llava / "model.safetensors").write_bytes(content)
        before = tree_state(old)
        result = self.export(cli, old, "--overwrite", checkpoint=llava)
        assert result.code == 2
        assert "NaN" in result.err
        assert tree_state(old) == before
        assert names(old.parent) == ["bundle"]

    def test_the_old_bundle_stays_when_the_new_export_is_interrupted(self, cli, old, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("fastvlm_convert.provenance.source_hash", interrupt)
        before = tree_state(old)
        assert self.export(cli, old, "--overwrite").code == 130
        assert tree_state(old) == before
        assert names(old.parent) == ["bundle"]


# Stops where everything but the manifest is written, until a signal comes.
WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from fastvlm_convert import pipeline
from fastvlm_convert.cli.main import main

def wait(folder):
    print("ready", flush=True)
    time.sleep(60)

pipeline.file_entries = wait
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_behind(tmp_path, number, code):
    output = tmp_path / "new" / "bundle"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "export", CHECKPOINT, *ARGUMENTS, output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    (partial,) = output.parent.iterdir()
    assert (partial / "onnx" / "vision_encoder.onnx").is_file()
    assert partial.name.endswith(".partial")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_bars_are_shown_on_a_terminal_alone(tmp_path):
    command = [sys.executable, "-m", "fastvlm_convert", "export", CHECKPOINT, *ARGUMENTS]
    err, err_side = pty.openpty()
    process = subprocess.Popen(
        [*command, tmp_path / "a"], stdout=subprocess.PIPE, stderr=err_side, stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(err_side)
    shown = read_all(err).decode()
    out, _ = process.communicate()
    assert process.returncode == 0
    assert "\x1b[" in shown
    assert "100%" in shown
    assert b"\x1b[" not in out
    assert b"100%" not in out
    piped = subprocess.run([*command, tmp_path / "b"], capture_output=True, text=True, check=True)
    assert "\x1b[" not in piped.stdout + piped.stderr
    assert "100%" not in piped.stderr


def test_disagreements_are_warned_of(cli, llava, tmp_path):
    edit_json(llava / "config.json", {"vocab_size": 151936})
    result = cli("export", llava, *ARGUMENTS, tmp_path / "b")
    assert "warning: config.json says vocab_size is 151936, the tensors say 512" in result.err
    document = json.loads(cli("export", llava, *ARGUMENTS, tmp_path / "c", "--json").out)
    assert any("vocab_size" in warning for warning in document["warnings"])
