import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from fastvlm_convert.bench.result import METRICS
from fastvlm_convert.bench.worker import trial
from fastvlm_convert.errors import PromptError
from tests.bundles import open_bundle
from tests.checkpoints import GOLDEN, LLAVA


class Counting:
    """A session that counts its calls."""

    def __init__(self, session) -> None:
        self._session = session
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name):
        value = getattr(self._session, name)
        if callable(value):
            self.calls[name] += 1
        return value


def test_every_trial_does_the_same_work(fp32_bundle):
    """End tokens are ignored: the model's first word is made one here, and it goes on."""
    loaded = open_bundle(fp32_bundle)
    session = Counting(loaded.session)
    model = replace(loaded, session=session, eos_token_ids=tuple(range(512)))
    found = trial(model, "Describe the image.", 5)
    assert session.calls["encode_image"] == session.calls["prefill"] == 1
    assert session.calls["decode"] == 4
    assert set(found) == set(METRICS)
    assert found["ttft_ms"] == pytest.approx(found["vision_ms"] + found["prefill_ms"])
    decode = 4 * found["decode_ms"]
    assert found["decode_tokens_per_s"] == pytest.approx(1e3 / found["decode_ms"])
    assert found["end_to_end_ms"] > found["prepare_ms"] + found["ttft_ms"] + decode  # and the text of it
    tokens = found["prefill_tokens_per_s"] * found["prefill_ms"] / 1e3
    assert tokens == pytest.approx(16 + 16 + 13)  # text, image and text


def test_too_long_an_answer(fp32_bundle):
    with pytest.raises(PromptError, match="exceed the context"):
        trial(open_bundle(fp32_bundle), "Describe the image.", 5000)


def test_the_protocol_on_standard_streams(fp32_bundle):
    load = {"do": "load", "kind": "bundle", "path": str(fp32_bundle), "target": "onnx"}
    requests = [
        {**load, "path": str(GOLDEN / LLAVA)},
        {**load, "image_size": 256, "context_length": 128},
        {"do": "trial", "question": "Describe the image.", "new_tokens": 3},
        {"do": "trial", "question": "Describe the image.", "new_tokens": 3000},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm_convert.bench.worker"],
        input="".join(json.dumps(r) + "\n" for r in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    refused, loaded, measured, too_long = map(json.loads, done.stdout.splitlines())
    assert "not a bundle" in refused["error"]
    assert loaded["executed_by"].startswith("onnxruntime")
    assert loaded["load_ms"] > 0
    assert measured["decode_tokens_per_s"] > 0
    assert ("energy_j" in measured) == (loaded["energy_not_run"] is None)
    assert measured["peak_memory_bytes"] > 20e6
    assert "exceed the context" in too_long["error"]


def test_the_calibration_loop_is_a_process_like_the_others():
    requests = [{"do": "load", "kind": "calibration"}, {"do": "trial"}]
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm_convert.bench.worker"],
        input="".join(json.dumps(r) + "\n" for r in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, measured = map(json.loads, done.stdout.splitlines())
    assert loaded["executed_by"].startswith("numpy ")
    assert measured["calibration_ms"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc counts a process's threads")
def test_onnx_runtime_has_the_threads_that_openmp_is_given(fp32_bundle):
    """It knows nothing of OpenMP, and would take one for every core."""
    code = (
        "import os, sys\n"
        "from fastvlm_convert.runtime.loaded import load_bundle\n"
        "import onnxruntime\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        f"model = load_bundle({str(fp32_bundle)!r}, 'onnx')\n"
        "sys.stdout.write(str(len(os.listdir('/proc/self/task')) - before))\n"
    )
    started = {}
    for threads in (1, 3):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        started[threads] = int(done.stdout)
    assert started[3] - started[1] == 3 * 2  # of three graphs, each with two threads beside the caller
