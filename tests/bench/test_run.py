import sys
from pathlib import Path

import pytest

from fastvlm_convert.bench.run import METRICS, Contender, bench
from fastvlm_convert.errors import BundleError, PromptError, WorkerError
from tests.checkpoints import GOLDEN, LLAVA

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


def run(*contenders: Contender, trials: int = 3, new_tokens: int = 3, **options):
    return bench(
        contenders, image_size=256, context_length=128, new_tokens=new_tokens, trials=trials, **options
    )


def test_both_contenders_are_measured_in_processes_of_their_own(fp32_bundle):
    shares: list[float] = []
    reference = Contender("reference", CHECKPOINT, None, 100)
    bundle = Contender("fp32 onnx", fp32_bundle, "onnx", 200)
    results = run(reference, bundle, on_progress=shares.append)
    assert [r.name for r in results] == ["reference", "fp32 onnx"]
    assert [r.executed_by.split()[0] for r in results] == ["torch", "onnxruntime"]
    assert [r.file_bytes for r in results] == [100, 200]
    assert shares == [0.25, 0.5, 0.75, 1.0]  # one round to warm up, three that count
    for result in results:
        assert result.load_ms > 0
        assert set(result.metrics) == set(METRICS)
        for metric, spread in result.metrics.items():
            assert 0 < spread.min <= spread.p50 <= spread.max
            assert spread.p90 <= spread.p50 if metric in RATES else spread.p90 >= spread.p50
        first = result.metrics["ttft_ms"]
        assert first.max >= result.metrics["vision_ms"].min + result.metrics["prefill_ms"].min
    assert results[0].ratio_to_reference == dict.fromkeys(METRICS, 1.0)
    for metric in METRICS:
        expected = results[1].metrics[metric].p50 / results[0].metrics[metric].p50
        assert results[1].ratio_to_reference[metric] == pytest.approx(expected)
    # torch alone is larger than all that the other process loads, so the figures cannot be shared
    assert results[0].peak_memory_bytes > results[1].peak_memory_bytes > 20e6


def test_without_a_reference_there_is_no_ratio(fp32_bundle, fp16_bundle):
    contenders = [Contender(b.name, b, "onnx", 1) for b in (fp32_bundle, fp16_bundle)]
    results = run(*contenders, trials=1)
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
        monkeypatch.setattr("fastvlm_convert.bench.run.sys.executable", str(program))

    return replace


LOADED = """
line = sys.stdin.readline()
print(json.dumps({"load_ms": 1, "executed_by": "x", "peak_memory_bytes": 1}), flush=True)
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
    trial = dict.fromkeys((*METRICS, "peak_memory_bytes"), 2.0)
    worker(
        f"{LOADED}sys.stderr.write('x' * (1 << 20))\n"
        f"for line in sys.stdin: print(json.dumps({trial!r}), flush=True)"
    )
    (result,) = run(Contender("mine", Path("b"), "onnx", 1), trials=1)
    assert result.metrics["vision_ms"].p50 == 2.0


def test_the_first_round_does_not_count(worker):
    worker(
        f"{LOADED}n = 100.0\n"
        "for line in sys.stdin:\n"
        f"    print(json.dumps(dict.fromkeys({(*METRICS, 'peak_memory_bytes')!r}, n)), flush=True)\n"
        "    n = 1.0 if n == 100.0 else n + 1\n"
    )
    (result,) = run(Contender("mine", Path("b"), "onnx", 1), trials=5)
    latency, rate = result.metrics["vision_ms"], result.metrics["decode_tokens_per_s"]
    assert (latency.min, latency.p50, latency.max) == (1.0, 3.0, 5.0)
    assert latency.p90 == pytest.approx(4.6)  # 90 % of the trials were at least as good
    assert rate.p90 == pytest.approx(1.4)
