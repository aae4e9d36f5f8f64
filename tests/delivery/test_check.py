"""Sound bundles pass; each thing that can be wrong with one is found, and nothing hangs or is followed."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_convert.delivery.check import CheckResult, check_bundle, require_sound
from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import FILE_NAME, file_entry
from fastvlm_convert.pipeline import export
from tests.bundles import copy_bundle, edit_manifest, recipe

DATA = "onnx/vision_encoder.onnx_data"
CONFIG = "config.json"


@pytest.fixture
def bundle(fp32_bundle, tmp_path):
    return copy_bundle(fp32_bundle, tmp_path)


@pytest.fixture
def licensed(llava, tmp_path):
    (llava / "LICENSE").write_text("Any License\n")
    return export(llava, tmp_path / "licensed", recipe=recipe(), targets=["onnx"]).bundle


def statuses(result: CheckResult) -> dict[str, str]:
    return {check.stage: check.status for check in result.checks}


def test_a_sound_bundle_passes(fp32_bundle):
    result = check_bundle(fp32_bundle)
    assert statuses(result) == dict.fromkeys(("manifest", "files", "contents"), "passed")
    assert (result.status, result.problems) == ("passed", ())
    assert result.warnings == ("the bundle brings no license; see that you may pass it on",)
    sizes = [p.stat().st_size for p in fp32_bundle.rglob("*") if p.is_file() and p.name != FILE_NAME]
    assert (result.num_files, result.total_bytes) == (len(sizes), sum(sizes))
    require_sound(fp32_bundle)


def flip(bundle: Path) -> None:
    content = bytearray((bundle / DATA).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / DATA).write_bytes(content)


def link(bundle: Path) -> None:
    (bundle / CONFIG).rename(bundle.parent / "elsewhere.json")
    (bundle / CONFIG).symlink_to(bundle.parent / "elsewhere.json")


def link_folder(bundle: Path) -> None:
    (bundle / "onnx").rename(bundle.parent / "elsewhere")
    (bundle / "onnx").symlink_to(bundle.parent / "elsewhere")


def pipe(bundle: Path) -> None:
    (bundle / CONFIG).unlink()
    os.mkfifo(bundle / CONFIG)


def listen(bundle: Path) -> None:
    (bundle / CONFIG).unlink()
    folder = Path.cwd()
    os.chdir(bundle)  # names of sockets are short
    socket.socket(socket.AF_UNIX).bind(CONFIG)
    os.chdir(folder)


def grow(bundle: Path) -> None:
    os.truncate(bundle / DATA, 1 << 40)  # a hole of a terabyte, which nobody may read


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        edit_manifest(bundle, lambda m: m["files"].update({new: m["files"].pop(old)}))

    return change


def add(name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        path = bundle / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")

    return change


FILES = {
    "flipped": (flip, f"'{DATA}' has other content than the manifest says"),
    "truncated": (lambda b: os.truncate(b / DATA, 100), f"'{DATA}' has 100 bytes, the manifest says "),
    "huge": (grow, f"'{DATA}' has {1 << 40} bytes, the manifest says "),
    "missing": (lambda b: (b / CONFIG).unlink(), f"'{CONFIG}' is missing"),
    "link": (link, f"'{CONFIG}' is a link"),
    "link of a folder": (link_folder, f"'{DATA}' lies behind a link"),
    "pipe": (pipe, f"'{CONFIG}' is a pipe"),
    "socket": (listen, f"'{CONFIG}' is a socket"),
    "folder": (
        lambda b: ((b / CONFIG).unlink(), (b / CONFIG).mkdir()),
        f"'{CONFIG}' is a folder",
    ),
    "file for a folder": (
        lambda b: (shutil.rmtree(b / "onnx"), (b / "onnx").write_text("x")),
        f"'{DATA}' is missing",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_fault_of_a_file_is_found(bundle, name):
    change, problem = FILES[name]
    change(bundle)
    result = check_bundle(bundle)
    assert statuses(result)["files"] == "failed"
    assert any(text.startswith(problem) for text in result.problems), result.problems
    with pytest.raises(BundleError, match="not sound"):
        require_sound(bundle)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (rename(CONFIG, "../config.json"), "'../config.json' does not lie inside"),
        (rename(CONFIG, "/etc/passwd"), "'/etc/passwd' does not lie inside"),
        (rename(CONFIG, "C:\\config.json"), "does not lie inside"),
        (rename(CONFIG, "a//b"), "'a//b' is no plain path"),
        (rename(CONFIG, "a\nb"), "cannot be printed"),
        (rename(CONFIG, "Tokenizer.json"), "are one file on some systems"),
        (rename(CONFIG, "verification.json"), "cannot be among its own files"),
        (lambda b: edit_manifest(b, lambda m: m.update(artifacts=[])), "lists no artifact"),
        (lambda b: edit_manifest(b, lambda m: m.pop("tool")), "missing setting tool"),
        (lambda b: edit_manifest(b, lambda m: m.update(more=1)), "unknown setting more"),
        (lambda b: (b / FILE_NAME).write_text((b / FILE_NAME).read_text()[:500]), "not valid JSON"),
        (lambda b: (b / FILE_NAME).write_text('{"a": 1, "a": 2}'), "stands twice"),
    ],
)  # fmt: skip
def test_every_fault_of_the_manifest_is_found(bundle, change, problem):
    change(bundle)
    result = check_bundle(bundle)
    assert statuses(result)["manifest"] == "failed"
    assert any(problem in text for text in result.problems), result.problems


def test_what_a_damaged_manifest_leaves_open_is_not_run(bundle):
    (bundle / FILE_NAME).write_text("{")
    result = check_bundle(bundle)
    assert statuses(result) == {
        "manifest": "failed", "files": "not_run", "contents": "not_run", "license": "not_run",
    }  # fmt: skip
    assert result.status == "failed"


@pytest.mark.parametrize("name", ["notes.txt", "onnx/another.onnx", "new/file", "coreml/x", "manifest.json"])
def test_what_does_not_belong_there_is_found(bundle, name):
    add(name)(bundle)
    result = check_bundle(bundle)
    assert statuses(result) == {"manifest": "passed", "files": "passed", "contents": "failed"}
    assert result.problems == (f"'{name}' is not the bundle's",)


def test_links_and_pipes_that_do_not_belong_there_are_found(bundle):
    (bundle / "up").symlink_to(bundle.parent)
    os.mkfifo(bundle / "onnx" / "pipe")
    assert check_bundle(bundle).problems == ("'onnx/pipe' is not the bundle's", "'up' is not the bundle's")


def test_what_a_mac_leaves_is_nobodys(bundle):
    (bundle / ".DS_Store").write_text("x")
    assert check_bundle(bundle).status == "passed"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_read_is_not_run(bundle):
    (bundle / CONFIG).chmod(0)
    result = check_bundle(bundle)
    assert (statuses(result)["files"], result.status) == ("not_run", "not_run")


class TestLicense:
    def test_it_and_its_notice_are_there(self, licensed):
        result = check_bundle(licensed)
        assert (statuses(result)["license"], result.warnings) == ("passed", ())

    @pytest.mark.parametrize("name", ["LICENSE", "NOTICE"])
    def test_a_bundle_from_which_it_was_taken_fails(self, licensed, name):
        (licensed / name).unlink()
        edit_manifest(licensed, lambda m: m["files"].pop(name))
        result = check_bundle(licensed)
        assert {stage for stage, status in statuses(result).items() if status == "failed"} == {"license"}
        assert result.problems == (f"'{name}' is not among the bundle's files",)

    def test_an_empty_one_is_none(self, licensed):
        (licensed / "LICENSE").write_text("")
        entry = vars(file_entry(licensed / "LICENSE"))
        edit_manifest(licensed, lambda m: m["files"].update(LICENSE=entry))
        assert check_bundle(licensed).problems == ("'LICENSE' is empty",)


class TestRecord:
    def test_a_record_about_another_manifest_fails(self, bundle):
        record = {"schema": "fastvlm-convert/verification", "schema_version": 2, "manifest_sha256": "0" * 64,
                  "tool": "1", "reference_sha256": "", "num_questions": 1, "status": "passed", "checks": [],
                  "measurements": [], "warnings": [], "answers": [], "answer_figures": [], "layers": [],
                  "first_divergence": {}, "diagnoses": []}  # fmt: skip
        (bundle / "verification.json").write_text(json.dumps(record))
        result = check_bundle(bundle)
        assert statuses(result)["verification"] == "failed"
        assert "about another manifest" in result.problems[0]

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "fastvlm-convert/verification"}'])
    def test_a_damaged_one_fails(self, bundle, content):
        (bundle / "verification.json").write_text(content)
        assert statuses(check_bundle(bundle)) == {
            "manifest": "passed", "files": "passed", "contents": "passed", "verification": "failed",
        }  # fmt: skip

    def test_a_link_or_a_pipe_is_none(self, bundle, tmp_path):
        os.mkfifo(bundle / "verification.json")
        assert statuses(check_bundle(bundle))["verification"] == "failed"
        (bundle / "verification.json").unlink()
        (bundle / "verification.json").symlink_to(tmp_path / "nowhere")
        assert "is a link" in check_bundle(bundle).problems[0]


def test_what_is_no_bundle_could_not_be_checked(tmp_path, golden_quantized, bundle):
    with pytest.raises(BundleError, match="there is no such bundle"):
        check_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="not a bundle"):
        check_bundle(tmp_path)
    with pytest.raises(BundleError, match="quantized checkpoint, which records no hashes"):
        check_bundle(golden_quantized)
    edit_manifest(bundle, lambda m: m.update(schema_version=3))
    with pytest.raises(BundleError, match="manifest version 3; this tool reads 2"):
        check_bundle(bundle)
    (bundle / FILE_NAME).unlink()
    (bundle / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    assert check_bundle(bundle).problems == (f"{FILE_NAME} is a link",)
