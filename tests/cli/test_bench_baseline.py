"""Comparisons with a baseline: of stored figures, so that no test depends on how fast a machine is."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fastvlm_convert.bench.baseline import save_result
from fastvlm_convert.bench.machine import Machine, this_machine
from fastvlm_convert.bench.result import BenchResult, ContenderResult, Settings, spreads_of
from fastvlm_convert.bench.threads import Pinning
from tests.cli.test_bench_imports import latency

GATED = ("vision_ms", "prefill_ms", "ttft_ms", "decode_ms", "end_to_end_ms")
ROUNDS = 30


def noise(seed: int, rounds: int = ROUNDS) -> np.ndarray:
    """Factors around 1 as a quiet machine has them."""
    return np.exp(np.random.default_rng(seed).normal(0, 0.02, rounds))


def contender(
    name: str, factor: float | np.ndarray = 1.0, seed: int = 0, rounds: int = ROUNDS
) -> ContenderResult:
    samples = {
        metric: tuple(map(float, 100 * (place + 1) * factor * noise(seed + place, rounds)))
        for place, metric in enumerate(GATED)
    }
    return ContenderResult(
        name=name,
        executed_by="torch 2" if name == "reference" else "onnxruntime 1",
        measured_on=this_machine().title,
        imported_from=None,
        load_ms=1.0,
        peak_memory_bytes=1,
        file_bytes=7,
        warmup={},
        metrics=spreads_of(samples),
        samples=samples,
        ratio_to_reference={},
        ratio_interval={},
        energy_not_run="none here",
    )


def run_of(
    path: Path,
    *contenders: ContenderResult,
    calibration: float | np.ndarray = 1.0,
    machine: Machine | None = None,
    **settings: Any,
) -> Path:
    """A stored result, as a run of this machine."""
    rounds = len(contenders[0].samples["vision_ms"])
    figures = tuple(map(float, 20 * calibration * noise(99, rounds)))
    given = {"trials": rounds, "new_tokens": 8, "image_size": 256, "pinning": Pinning(1, (0,)), **settings}
    save_result(
        path, BenchResult(machine or this_machine(), Settings(calibration_ms=figures, **given), contenders)
    )
    return path


def compared(cli, new: Path, old: Path, *options):
    return cli("bench", "--import", new, "--against", old, *options)


class TestTwoRuns:
    def test_the_same_speed_passes(self, cli, tmp_path):
        old = run_of(tmp_path / "old", contender("app onnx"))
        new = run_of(tmp_path / "new", contender("app onnx", seed=50))
        result = compared(cli, new, old, "--json")
        assert result.code == 0
        document = result.document
        assert (document["status"], document["against"]) == ("passed", str(old))
        assert document["max_regression_percent"] == 5
        assert [c["metric"] for c in document["comparisons"]] == list(GATED)
        for found in document["comparisons"]:
            assert (found["contender"], found["kind"], found["status"]) == ("app onnx", "unpaired", "passed")
            assert found["basis"] == "calibration loop"
            assert found["interval"]["low"] < found["ratio"] < found["interval"]["high"]
            assert 0.97 < found["ratio"] < 1.03

    def test_a_planted_regression_fails(self, cli, tmp_path):
        old = run_of(tmp_path / "old", contender("app onnx"))
        new = run_of(tmp_path / "new", contender("app onnx", 1.2, seed=50))
        result = compared(cli, new, old, "--json")
        assert (result.code, result.document["status"]) == (1, "failed")
        for found in result.document["comparisons"]:
            assert found["ratio"] == pytest.approx(1.2, abs=0.03)
            assert found["interval"]["low"] > 1.05
        text = compared(cli, new, old)
        assert text.code == 1
        assert "failed: 5 of 5 figures got slower than allowed; most of all app onnx: " in text.out

    def test_only_the_part_that_got_slower_fails(self, cli, tmp_path):
        slow = contender("app onnx", seed=50)
        samples = {**slow.samples, "decode_ms": tuple(1.3 * ms for ms in slow.samples["decode_ms"])}
        slow = replace(slow, samples=samples, metrics=spreads_of(samples))
        old = run_of(tmp_path / "old", contender("app onnx"))
        document = compared(cli, run_of(tmp_path / "new", slow), old, "--json").document
        assert [c["metric"] for c in document["comparisons"] if c["status"] == "failed"] == ["decode_ms"]

    @pytest.mark.parametrize(("percent", "code"), [(5, 1), (15, 1), (30, 0), (0, 1)])
    def test_as_much_as_is_allowed_passes(self, cli, tmp_path, percent, code):
        old = run_of(tmp_path / "old", contender("app onnx"))
        new = run_of(tmp_path / "new", contender("app onnx", 1.2, seed=50))
        assert compared(cli, new, old, "--max-regression", percent).code == code

    def test_faster_passes(self, cli, tmp_path):
        old = run_of(tmp_path / "old", contender("app onnx"))
        new = run_of(tmp_path / "new", contender("app onnx", 0.5, seed=50))
        assert compared(cli, new, old, "--max-regression", 0).code == 0

    def test_noise_that_hides_the_difference_is_no_regression(self, cli, tmp_path):
        """8 % slower by the medians, but the interval reaches below the 5 % that are allowed."""
        wild = np.exp(np.random.default_rng(5).normal(0, 0.5, ROUNDS))
        old = run_of(tmp_path / "old", contender("app onnx"))
        new = run_of(tmp_path / "new", contender("app onnx", 1.08 * wild / np.median(wild)))
        result = compared(cli, new, old, "--json")
        assert result.code == 0
        assert all(
            c["interval"]["low"] < 1.05 < c["interval"]["high"] for c in result.document["comparisons"]
        )

    def test_a_machine_that_is_busier_as_a_whole_is_no_regression(self, cli, tmp_path):
        """Half as fast, the calibration loop too."""
        old = run_of(tmp_path / "old", contender("app onnx"))
        new = run_of(tmp_path / "new", contender("app onnx", 2.0, seed=50), calibration=2.0)
        assert compared(cli, new, old).code == 0

    def test_a_machine_that_gets_busier_within_the_run_is_no_regression(self, cli, tmp_path):
        slower = np.linspace(1, 4, ROUNDS)
        old = run_of(tmp_path / "old", contender("app onnx"))
        new = run_of(tmp_path / "new", contender("app onnx", slower, seed=50), calibration=slower)
        assert compared(cli, new, old).code == 0

    def test_a_reference_in_both_runs_is_the_yardstick(self, cli, tmp_path):
        """Both got slower; the calibration loop, which did not, would call that a regression."""
        old = run_of(tmp_path / "old", contender("reference"), contender("app onnx", seed=20))
        new = run_of(tmp_path / "new", contender("reference", 1.5, 40), contender("app onnx", 1.5, 60))
        result = compared(cli, new, old, "--json")
        assert result.code == 0
        assert {c["basis"] for c in result.document["comparisons"]} == {"reference"}
        assert {c["contender"] for c in result.document["comparisons"]} == {"app onnx"}

    def test_another_torch_is_another_yardstick(self, cli, tmp_path):
        newer = replace(contender("reference", 1.5, 40), executed_by="torch 3")
        old = run_of(tmp_path / "old", contender("reference"), contender("app onnx", seed=20))
        new = run_of(tmp_path / "new", newer, contender("app onnx", 1.5, 60))
        result = compared(cli, new, old, "--json")
        assert result.code == 1
        assert {c["basis"] for c in result.document["comparisons"]} == {"calibration loop"}

    def test_equal_files_give_equal_documents(self, cli, tmp_path):
        old = run_of(tmp_path / "old", contender("app onnx"))
        new = run_of(tmp_path / "new", contender("app onnx", seed=50))
        assert compared(cli, new, old, "--json").out == compared(cli, new, old, "--json").out

    def test_what_is_gone_could_not_be_compared(self, cli, tmp_path):
        old = run_of(tmp_path / "old", contender("app onnx"), contender("app coreml"))
        new = run_of(tmp_path / "new", contender("app onnx", seed=50), contender("more onnx"))
        result = compared(cli, new, old, "--json")
        assert (result.code, result.document["status"]) == (2, "not_run")
        (gone,) = [c for c in result.document["comparisons"] if c["status"] == "not_run"]
        assert (gone["contender"], gone["metric"]) == ("app coreml", None)
        assert "the baseline has it, this run does not" in compared(cli, new, old).err

    def test_a_regression_is_told_though_something_is_gone(self, cli, tmp_path):
        old = run_of(tmp_path / "old", contender("app onnx"), contender("app coreml"))
        assert compared(cli, run_of(tmp_path / "new", contender("app onnx", 2.0)), old).code == 1

    def test_too_few_rounds_could_not_be_compared(self, cli, tmp_path):
        old = run_of(tmp_path / "old", contender("app onnx", rounds=29))
        new = run_of(tmp_path / "new", contender("app onnx", 9.0))
        result = compared(cli, new, old)
        assert result.code == 2
        assert "the baseline has 29 samples; 30 are needed" in result.err


class TestPhones:
    """Nothing says how fast a phone was, so its figures are compared as they are."""

    def test_a_planted_regression(self, cli, tmp_path):
        old, new = tmp_path / "old.json", tmp_path / "new.json"
        for path, factor, seed in ((old, 1.0, 0), (new, 1.2, 1)):
            figures = {"decode_ms": list(20 * factor * noise(seed)), "ttft_ms": list(500 * noise(seed))}
            phone = latency(tmp_path / "phone.json", samples=figures)
            assert cli("bench", "--import", phone, "--save-baseline", path).code == 0
        result = cli("bench", "--import", new, "--against", old, "--json")
        assert result.code == 1
        statuses = {c["metric"]: c["status"] for c in result.document["comparisons"]}
        assert statuses == {"ttft_ms": "passed", "decode_ms": "failed"}
        assert {c["basis"] for c in result.document["comparisons"]} == {"nothing"}
        assert cli("bench", "--import", phone, "--against", old).code == 1  # the phone's file itself

    def test_another_phone(self, cli, tmp_path):
        figures = {"decode_ms": list(20 * noise(0))}
        old, phone = tmp_path / "old.json", tmp_path / "phone.json"
        assert cli("bench", "--import", latency(phone, samples=figures), "--save-baseline", old).code == 0
        latency(phone, samples=figures, measured_on="Pixel 10")
        result = cli("bench", "--import", phone, "--against", old)
        assert (result.code, result.out) == (2, "")
        assert "app was measured on Pixel 9, Android 15, now on Pixel 10" in result.err
        assert cli("bench", "--import", phone, "--against", old, "--any-machine").code == 0


OTHER_MACHINES: dict[str, tuple[Callable[[Machine], Machine], str]] = {
    "processor": (lambda m: replace(m, cpu="AMD EPYC 7B13"), "processor AMD EPYC 7B13, here "),
    "instructions": (lambda m: replace(m, instructions=("sse",)), "instructions sse, here "),
    "cores": (lambda m: replace(m, cores=m.cores + 62), "cores "),
    "logical": (lambda m: replace(m, logical_cpus=m.logical_cpus + 62), "logical processors "),
    "memory": (lambda m: replace(m, memory_bytes=2 * m.memory_bytes), "memory "),
    "system": (lambda m: replace(m, system="Darwin"), "system Darwin, here "),
    "architecture": (lambda m: replace(m, architecture="riscv64"), "architecture riscv64, here "),
    "governor": (lambda m: replace(m, governor="powersave!"), "governor powersave!, here "),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MACHINES)
def test_a_baseline_of_another_machine(cli, tmp_path, name):
    change, message = OTHER_MACHINES[name]
    old = run_of(tmp_path / "old", contender("app onnx"), machine=change(this_machine()))
    new = run_of(tmp_path / "new", contender("app onnx"))
    result = compared(cli, new, old)
    assert (result.code, result.out) == (2, "")
    assert f"error: the baseline is of another machine: {message}" in result.err
    assert "--any-machine" in result.err
    allowed = compared(cli, new, old, "--any-machine")
    assert allowed.code == 0
    assert message in allowed.err.replace("\n", " ")


def test_other_software_is_said_and_compared(cli, tmp_path):
    """A newer runtime is what somebody may want to compare."""
    here = this_machine()
    older = replace(here, kernel="1.0", libraries={**here.libraries, "numpy": "0.1", "python": "2.7"})
    older.libraries.pop("onnxruntime", None)
    old = run_of(tmp_path / "old", contender("app onnx"), machine=older)
    result = compared(cli, run_of(tmp_path / "new", contender("app onnx")), old)
    assert result.code == 0
    for text in ("the kernel was 1.0, is ", "numpy was 0.1, is ", "onnxruntime was not installed, is "):
        assert f"since the baseline: {text}" in result.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"new_tokens": 9}, "measured with --new-tokens 9, this run with 8"),
        ({"pinning": Pinning(2, (0, 1))}, "measured with --threads 2, this run with 1"),
        ({"image_size": 1024}, "measured with the image size 1024, this run with 256"),
    ],
)
def test_a_baseline_of_other_work(cli, tmp_path, settings, message):
    old = run_of(tmp_path / "old", contender("app onnx"), **settings)
    new = run_of(tmp_path / "new", contender("app onnx"))
    for options in ((), ("--any-machine",)):
        result = compared(cli, new, old, *options)
        assert (result.code, result.out) == (2, "")
        assert f"error: the baseline was {message}" in result.err


def test_a_baseline_of_other_bundles(cli, tmp_path):
    old = run_of(tmp_path / "old", contender("reference"), contender("other onnx"))
    result = compared(cli, run_of(tmp_path / "new", contender("reference"), contender("app onnx")), old)
    assert (result.code, result.out) == (2, "")
    assert "the baseline has reference, other onnx, and this run reference, app onnx" in result.err


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "schema": (lambda v: v.update(schema="x"), "no result of fastvlm-convert bench"),
    "version": (lambda v: v.update(schema_version=9), "result version 9; this tool reads 1"),
    "no_contenders": (lambda v: v.update(contenders=[]), "it has no contenders"),
    "no_machine": (lambda v: v.update(machine=None), "nothing says how 'app onnx' was measured"),
    "twice": (lambda v: v["contenders"].append(v["contenders"][0]), "'app onnx' is there twice"),
    "unknown_key": (lambda v: v.update(speed=1), "unknown setting speed"),
    "missing_key": (lambda v: v.pop("settings"), "missing setting settings"),
    "wrong_type": (lambda v: v.update(machine="fast"), "machine is 'fast', expected"),
    "a_sample_lost": (lambda v: v["contenders"][0]["samples"]["ttft_ms"].pop(), "29, 30 samples of"),
    "a_sample_of_zero": (lambda v: v["contenders"][0]["samples"].update(ttft_ms=[0.0] * 30), "is 0.0, "),
    "a_calibration_lost": (lambda v: v["settings"]["calibration_ms"].pop(), "29, 30 samples"),
    "a_calibration_of_zero": (
        lambda v: v["settings"].update(calibration_ms=[0.0] * 30), "calibration_ms holds 0.0",
    ),
    "an_unknown_metric": (
        lambda v: v["contenders"][0]["samples"].update(speed=[1.0] * 30), "unknown metric 'speed'",
    ),
    "metrics_edited": (
        lambda v: v["contenders"][0]["metrics"]["ttft_ms"].update(p50=1.0),
        "metrics of 'app onnx' do not follow from its samples",
    ),
    "a_metric_gone": (
        lambda v: v["contenders"][0]["metrics"].pop("ttft_ms"), "metrics of 'app onnx' do not follow",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_baseline(cli, tmp_path, name):
    damage, message = DAMAGE[name]
    old = run_of(tmp_path / "old", contender("app onnx"))
    value = json.loads(old.read_text())
    damage(value)
    old.write_text(json.dumps(value))
    result = compared(cli, run_of(tmp_path / "new", contender("app onnx")), old)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert str(old) in result.err
    assert "hint: " in result.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "expected an object"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (None, "cannot read"),
    ],
)
def test_a_baseline_that_is_none(cli, tmp_path, content, message):
    old = tmp_path / "old"
    if content is not None:
        old.write_bytes(content)
    result = compared(cli, run_of(tmp_path / "new", contender("app onnx")), old, "--json")
    assert result.code == 2
    assert result.document["error"]["code"] == "benchmark"
    assert message in result.document["error"]["message"]


class TestOutputFormats:
    @pytest.fixture
    def slower(self, cli, tmp_path):
        old = run_of(tmp_path / "old", contender("app onnx"), contender("app coreml"))
        new = run_of(tmp_path / "new", contender("app onnx", 1.2, seed=50))
        return lambda *options: compared(cli, new, old, *options)

    def test_github(self, slower):
        result = slower("--output-format", "github")
        assert result.code == 1
        errors = [line for line in result.out.splitlines() if line.startswith("::error ")]
        assert len(errors) == 5
        assert errors[0].startswith("::error title=bench-regression::app onnx: vision_ms +")
        assert "app coreml: not run: the baseline has it, this run does not" in result.out

    def test_junit(self, slower):
        result = slower("--output-format", "junit")
        assert result.code == 1
        suite = ElementTree.fromstring(result.out).find("testsuite")
        assert (suite.get("name"), suite.get("failures")) == ("bench", "5")
        names = [case.get("name") for case in suite if case.find("failure") is not None]
        assert names == ["bench-regression (app onnx)"] * 5

    def test_json_is_what_json_prints(self, slower):
        assert slower("--output-format", "json").document == slower("--json").document

    def test_quiet_is_one_line(self, slower):
        result = slower("-q")
        assert result.err == ""
        assert result.out.count("\n") == 1
        assert result.out.startswith(
            "failed: 5 of 6 figures got slower than allowed, 1 could not be compared; "
        )


def test_the_baseline_may_not_be_the_one_that_is_replaced(cli, tmp_path):
    old = run_of(tmp_path / "old", contender("app onnx"))
    before = old.read_bytes()
    result = compared(cli, run_of(tmp_path / "new", contender("app onnx")), old, "--save-baseline", old)
    assert result.code == 2
    assert "--save-baseline would replace the baseline" in result.err
    assert old.read_bytes() == before


def scaled(path: Path, factor: float) -> None:
    """Make a stored result slower or faster, as somebody with an editor would."""
    value = json.loads(path.read_text())
    for found in value["contenders"]:
        samples = {
            metric: [number * (1 / factor if metric.endswith("_per_s") else factor) for number in numbers]
            for metric, numbers in found["samples"].items()
        }
        found["samples"] = samples
        found["metrics"] = {m: dataclasses.asdict(s) for m, s in spreads_of(samples).items()}
    path.write_text(json.dumps(value))


@pytest.mark.slow
def test_measured_against_a_stored_result(cli, fp32_bundle, tmp_path):
    """With factors that no machine's mood comes near."""
    argv = ("bench", fp32_bundle, "--new-tokens", 2, "--threads", 1)
    base = tmp_path / "base.json"
    assert cli(*argv, "--save-baseline", base, "-q").code == 0
    scaled(base, 1000)
    assert cli(*argv, "--against", base, "-q").code == 0
    scaled(base, 1e-6)
    result = cli(*argv, "--against", base, "--json")
    assert (result.code, result.document["status"]) == (1, "failed")
    assert {c["status"] for c in result.document["comparisons"]} == {"failed"}
    assert {c["basis"] for c in result.document["comparisons"]} == {"calibration loop"}


@pytest.mark.slow
def test_measured_against_a_bundle_of_the_same_rounds(cli, fp32_bundle, tmp_path):
    old = shutil.copytree(fp32_bundle, tmp_path / "old")
    argv = ("bench", fp32_bundle, "--against", old, "--new-tokens", 2, "--threads", 1)
    document = cli(*argv, "--max-regression", 1e6, "--json").document
    assert document["status"] == "passed"
    assert [c["name"] for c in document["contenders"]] == ["baseline onnx", "fp32 onnx"]
    assert {(c["kind"], c["basis"]) for c in document["comparisons"]} == {("paired", "same round")}
    baseline, ours = document["contenders"]
    assert len(document["comparisons"]) == len(GATED)
    for found in document["comparisons"]:
        pairs = zip(ours["samples"][found["metric"]], baseline["samples"][found["metric"]], strict=True)
        expected = np.exp(np.median([np.log(new / old) for new, old in pairs]))  # of an even number
        assert found["ratio"] == pytest.approx(expected)


@pytest.mark.parametrize("against", ["file", "bundle"])
def test_too_few_rounds_are_refused_before_anything_is_measured(cli, fp32_bundle, tmp_path, against):
    old = fp32_bundle if against == "bundle" else run_of(tmp_path / "old", contender("fp32 onnx"))
    result = cli("bench", fp32_bundle, "--against", old, "--trials", 29)
    assert (result.code, result.out) == (2, "")
    assert "29 rounds, and a comparison needs 30" in result.err


def test_another_machine_is_refused_before_anything_is_measured(cli, fp32_bundle, tmp_path):
    """The bundle's graph is damaged, but nobody has come to read it."""
    bundle = Path(shutil.copytree(fp32_bundle, tmp_path / "fp32"))
    graph = bundle / "onnx" / "embed_tokens.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    machine = replace(this_machine(), cpu="AMD EPYC 7B13")
    settings = {"new_tokens": 32, "image_size": 256, "machine": machine}
    old = run_of(tmp_path / "old", contender("fp32 onnx"), **settings)
    result = cli("bench", bundle, "--against", old, "--threads", 1)
    assert (result.code, result.out) == (2, "")
    assert "error: the baseline is of another machine: processor AMD EPYC" in result.err


def test_more_threads_than_processors(cli, fp32_bundle):
    result = cli("bench", fp32_bundle, "--threads", 100_000)
    assert (result.code, result.out) == (2, "")
    assert "100000 threads, and this process may use " in result.err
