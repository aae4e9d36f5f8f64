"""What `doctor` finds: here, with libraries missing or broken, and on machines that are too small."""

import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import pytest

from fastvlm_convert.doctor import examine as examined
from fastvlm_convert.doctor.examine import Diagnosis, examine
from fastvlm_convert.doctor.machine import this_machine
from fastvlm_convert.lint.versions import BAD_PAIRS, bad_pairs
from fastvlm_convert.pipeline import plan
from tests.checkpoints import GOLDEN, LLAVA

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    return examine()


def test_versions_are_those_that_are_installed(here):
    found = {library.name: library for library in here.libraries}
    for name in ("numpy", "typer", "onnx", "torch"):
        assert found[name].installed == metadata.version(name)
        assert found[name].state == "ready", found[name].problem
        assert found[name].required.startswith(">=")


def test_what_can_be_done_is_what_the_libraries_allow(here):
    able = {ability.what: ability.here for ability in here.abilities}
    assert able["run ONNX bundles"]
    assert able["run bundles on a phone"] is False
    assert able["run Core ML packages with Apple's kernels"] == (sys.platform == "darwin")
    assert all((ability.reason is None) == ability.here for ability in here.abilities)


def test_the_machine_is_this_one(here):
    assert here.machine.python == sys.version.split()[0]
    assert 0 < (here.machine.available_bytes or 1) <= here.machine.memory_bytes
    assert here.machine.free_disk_bytes > 0
    assert here.needs == ()


def installed_in(folder, name: str, version: str, code: str) -> None:
    """A distribution that is there, with this as its module."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_library_that_does_not_load_is_broken_and_one_that_is_new_untested(tmp_path):
    """In a process that finds others first."""
    installed_in(tmp_path, "onnx", "1.23.2", "raise ImportError('numpy.core.multiarray failed to import')")
    installed_in(tmp_path, "typer", "0.99", "")
    code = (
        "from fastvlm_convert.doctor.libraries import libraries\n"
        "print([(x.state, x.problem) for x in libraries() if x.name in ('onnx', 'typer')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{tmp_path}:.", "PATH": ""},
    )  # fmt: skip
    assert "('untested', '0.99 is untested; this tool was made for >=0.28,<0.30')" in done.stdout
    assert "('broken', 'does not load: ImportError: numpy.core.multiarray failed to import')" in done.stdout


def without_extras(here, monkeypatch, machine) -> Diagnosis:
    """What is found about the golden checkpoint on another machine, where no extra is installed."""
    fewer = tuple(
        library if library.extra is None else replace(library, state="missing", problem="not installed")
        for library in here.libraries
    )
    monkeypatch.setattr(examined, "libraries", lambda: fewer)
    monkeypatch.setattr(examined, "this_machine", lambda: machine)
    return examine(CHECKPOINT)


def test_needs_are_what_plan_says_and_missing_extras_are_no_failure(here, monkeypatch):
    small = plan(CHECKPOINT, recipe="fp16", targets=["onnx", "coreml"])
    machine = replace(this_machine(), memory_bytes=small.peak_memory_bytes, free_disk_bytes=10**9)
    found = without_extras(here, monkeypatch, machine)
    needs = {need.recipe: need for need in found.needs}
    assert (needs["fp16"].disk_bytes, needs["fp16"].memory_bytes) == (
        small.total_bytes, small.peak_memory_bytes,
    )  # fmt: skip
    assert needs["fp16"].fits
    assert needs["ios-ane"].targets == ("coreml",)
    assert not needs["int4"].fits
    assert needs["int4"].reason.startswith("memory: ")
    failed = {(o.id, o.where, o.severity) for o in found.outcomes if o.status == "failed"}
    assert ("needs", "int4", "warning") in failed
    assert not {o for o in found.outcomes if o.status == "failed" and o.id.startswith("library-")}
    assert not any(ability.here for ability in found.abilities if "ONNX" in ability.what)


def test_a_machine_that_no_recipe_fits_is_an_error(here, monkeypatch):
    found = without_extras(here, monkeypatch, replace(this_machine(), free_disk_bytes=1000))
    severities = {o.severity for o in found.outcomes if o.id == "needs" and o.status == "failed"}
    assert severities == {"error"}
    assert all("disk: " in need.reason for need in found.needs)


@pytest.mark.parametrize(
    ("present", "ids"),
    [
        ({"onnxruntime": (1, 24, 3), "arm64": ()}, ["onnxruntime-arm64"]),
        ({"onnxruntime": (1, 25), "arm64": ()}, []),
        ({"onnxruntime": (1, 24, 3)}, []),
        ({"coremltools": (9, 0), "macos": (26, 1)}, ["coremltools-macos-26"]),
        ({"coremltools": (8, 3), "macos": (26, 1)}, []),
        ({"coremltools": (9, 0), "numpy": (2, 4, 6)}, ["coremltools-numpy"]),
        ({"coremltools": (9, 0), "numpy": (2, 3, 5)}, []),
        ({"onnxruntime": (1, 21, 1), "fastvlm-convert": (0, 1, 0)}, ["onnxruntime-8-bit"]),
    ],
)
def test_bad_pairs_need_both(present, ids):
    assert [pair.id for pair in bad_pairs(present)] == ids


def test_every_bad_pair_has_a_source():
    assert all(pair.source.startswith("https://") for pair in BAD_PAIRS)
    assert len({pair.id for pair in BAD_PAIRS}) == len(BAD_PAIRS)
