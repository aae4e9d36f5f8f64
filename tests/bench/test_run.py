import json
import os
import sys
from pathlib import Path

import pytest

from fastvlm_convert.bench.machine import this_machine
from fastvlm_convert.bench.process import Contender
from fastvlm_convert.bench.result import CALIBRATION, METRICS
from fastvlm_convert.bench.run import bench
from fastvlm_convert.bench.threads import pinning
from fastvlm_convert.errors import BundleError, PromptError, WorkerError
from tests.checkpoints import GOLDEN, LLAVA

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
FIGURES = (*METRICS, CALIBRATION, "peak_memory_bytes")
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


def run(*contenders: Contender, trials: int = 3, new_tokens: int = 3, **options):
    threads = pinning(1)
    return bench(
        contenders,
        threads,
        image_size=256,
        context_length=128,
        new_tokens=new_tokens,
        trials=trials,
        **options,
    )


def test_both_contenders_are_measured_in_processes_of_their_own(fp32_bundle):
    shares: list[float] = []
    reference = Contender("reference", CHECKPOINT, None, 100)
    bundle = Contender("fp32 onnx", fp32_bundle, "onnx", 200)
    result = run(reference, bundle, on_progress=shares.append)
    results = result.contenders
    assert result.status == "passed"
    assert result.settings.pinning.threads == 1
    assert len(result.settings.calibration_ms) == 3
    assert [r.name for r in results] == ["reference", "fp32 onnx"]
    assert [r.executed_by.split()[0] for r in results] == ["torch", "onnxruntime"]
    assert [r.file_bytes for r in results] == [100, 200]
    assert shares == [0.25, 0.5, 0.75, 1.0]  # one round to warm up, three that count
    machine = this_machine()
    assert result.machine == machine
    for result in results:
        assert result.load_ms > 0
        assert result.measured_on.startswith(machine.cpu)
        assert set(METRICS) <= set(result.metrics) == set(result.samples) <= {*METRICS, "energy_j"}
        assert {len(samples) for samples in result.samples.values()} == {3}
        assert set(result.warmup) == set(result.metrics)
        for metric, spread in result.metrics.items():
            assert 0 < spread.min <= spread.p50 <= spread.max
            assert spread.p99 is None  # three rounds cannot tell it from the worst
            assert spread.p90 <= spread.p50 if metric in RATES else spread.p90 >= spread.p50
        first = result.metrics["ttft_ms"]
        assert first.max >= result.metrics["vision_ms"].min + result.metrics["prefill_ms"].min
    assert set(results[0].ratio_to_reference.values()) == {1.0}
    for metric in METRICS:
        pairs = zip(results[1].samples[metric], results[0].samples[metric], strict=True)
        expected = sorted(ours / theirs for ours, theirs in pairs)[1]  # of the same round
        assert results[1].ratio_to_reference[metric] == pytest.approx(expected)
        assert results[1].ratio_interval == {}  # three rounds are too few
    # torch alone is larger than all that the other process loads, so the figures cannot be shared
    assert results[0].peak_memory_bytes > results[1].peak_memory_bytes > 20e6


def test_without_a_reference_there_is_no_ratio(fp32_bundle, fp16_bundle):
    contenders = [Contender(b.name, b, "onnx", 1) for b in (fp32_bundle, fp16_bundle)]
    results = run(*contenders, trials=1).contenders
    assert [r.name for r in results] == ["fp32", "fp16"]
    assert [r.ratio_to_reference for r in results] == [{}, {}]


def test_a_contender_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"not a bundle: it has no fastvlm_manifest\.json") as caught:
        run(Contender("lost", tmp_path, "onnx", 1))
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint


def test_answers_that_do_not_fit_are_refused(fp32_bundle):
    with pytest.raises(PromptError, match="exceed the context of 2048 tokens"):
        run(Contender("b", fp32_bundle, "onnx", 1), new_tokens=4000)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Puts a program in the place of the worker."""

    def replace(source: str) -> None:
        script = tmp_path / "worker.py"
        script.write_text(f"import json, os, sys\n{source}")
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
        program.chmod(0o755)
        monkeypatch.setattr("fastvlm_convert.bench.process.sys.executable", str(program))

    return replace


LOADED = """
line = sys.stdin.readline()
loaded = {"load_ms": 1, "executed_by": "x", "energy_not_run": "none here", "peak_memory_bytes": 1}
print(json.dumps(loaded), flush=True)
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sys.exit('no space for another tensor')", "ended: no space for another tensor"),
        ("os._exit(9)", "ended: exit code 9"),
        ("os.kill(os.getpid(), 9)", "ended: exit code -9"),
        (f"{LOADED}os._exit(3)", "ended: exit code 3"),
        (f"{LOADED}sys.stdin.readline(); sys.stdout.write('half a li'); os._exit(4)", "ended: exit code 4"),
        (f"{LOADED}raise MemoryError", "ended: MemoryError"),
    ],
    ids=["speaks", "silent", "killed", "after_loading", "in_the_middle_of_a_line", "raises"],
)
def test_a_worker_that_dies_is_an_error_that_says_how(worker, source, message):
    worker(source)
    with pytest.raises(WorkerError, match=f"the process that ran it {message}") as caught:
        run(Contender("mine", Path("some/bundle"), "onnx", 1))
    assert caught.value.where == "some/bundle"
    assert caught.value.hint == "it may have run out of memory"


def test_a_worker_that_writes_much_to_its_log_does_not_hang(worker):
    trial = dict.fromkeys(FIGURES, 2.0)
    worker(
        f"{LOADED}sys.stderr.write('x' * (1 << 20))\n"
        f"for line in sys.stdin: print(json.dumps({trial!r}), flush=True)"
    )
    (result,) = run(Contender("mine", Path("b"), "onnx", 1), trials=1).contenders
    assert result.metrics["vision_ms"].p50 == 2.0


def test_the_first_round_has_figures_of_its_own(worker):
    worker(
        f"{LOADED}n = 100.0\n"
        "for line in sys.stdin:\n"
        f"    print(json.dumps(dict.fromkeys({FIGURES!r}, n)), flush=True)\n"
        "    n = 1.0 if n == 100.0 else n + 1\n"
    )
    (result,) = run(Contender("mine", Path("b"), "onnx", 1), trials=5).contenders
    assert result.warmup == dict.fromkeys(METRICS, 100.0)
    latency, rate = result.metrics["vision_ms"], result.metrics["decode_tokens_per_s"]
    assert (latency.min, latency.p50, latency.max) == (1.0, 3.0, 5.0)
    assert latency.p90 == pytest.approx(4.6)  # 90 % of the trials were at least as good
    assert rate.p90 == pytest.approx(1.4)


def test_the_99th_percentile_takes_a_hundred_rounds(worker):
    """Of 1, 2, 3 ... 100 it is 99.01, and of a rate the other end."""
    worker(
        f"{LOADED}n = 0.0\n"
        "for line in sys.stdin:\n"
        f"    print(json.dumps(dict.fromkeys({FIGURES!r}, n or 1)), flush=True)\n"
        "    n += 1\n"
    )
    (result,) = run(Contender("mine", Path("b"), "onnx", 1), trials=100).contenders
    assert result.metrics["vision_ms"].p99 == pytest.approx(99.01)
    assert result.metrics["decode_tokens_per_s"].p99 == pytest.approx(1.99)


def test_with_thirty_rounds_ratios_have_intervals(worker, tmp_path):
    """Every contender is the same program here: the ratio is 1, and so is its interval."""
    trial = dict.fromkeys(FIGURES, 2.0)
    worker(f"{LOADED}for line in sys.stdin: print(json.dumps({trial!r}), flush=True)")
    reference, ours = run(
        Contender("reference", tmp_path, None, 1), Contender("b", tmp_path, "onnx", 1), trials=30
    ).contenders
    assert set(ours.ratio_interval) == set(METRICS) == set(reference.ratio_interval)
    assert {(i.low, i.high) for i in ours.ratio_interval.values()} == {(1.0, 1.0)}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process was given")
@pytest.mark.parametrize("threads", [1, 2])
def test_every_process_gets_the_threads_and_processors_that_the_result_names(worker, threads):
    """As the process itself sees them: a name of the contender stands for what it was given."""
    usable = os.sched_getaffinity(0)
    if len(usable) < threads:
        pytest.skip("this machine has one processor")
    given = (
        "line = sys.stdin.readline()\n"
        "threads = [os.environ[f'{library}_NUM_THREADS'] for library in ('OMP', 'OPENBLAS')]\n"
        "seen = json.dumps([sorted(os.sched_getaffinity(0)), *threads])\n"
        "loaded = {'load_ms': 1, 'executed_by': seen, 'energy_not_run': None, 'peak_memory_bytes': 1}\n"
        "print(json.dumps(loaded), flush=True)\n"
    )
    trial = dict.fromkeys(FIGURES, 2.0)
    worker(f"{given}for line in sys.stdin: print(json.dumps({trial!r}), flush=True)")
    chosen = pinning(threads)
    found = bench(
        [Contender("mine", Path("b"), "onnx", 1)],
        chosen,
        image_size=256,
        context_length=128,
        new_tokens=2,
        trials=1,
    )
    cpus, *counts = json.loads(found.contenders[0].executed_by)
    assert (tuple(cpus), counts) == (chosen.cpus, [str(threads)] * 2)
    assert len(cpus) == threads
    assert os.sched_getaffinity(0) == usable  # the run itself is bound no longer
