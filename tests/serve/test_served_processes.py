"""The server with workers that are processes, as a terminal starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.bundles import copy_bundle
from tests.cli.test_serve import heed_interrupts
from tests.serve.engines.questions import answers_of_run, demo_questions
from tests.serve.servers import CHAT, PICTURES, question, text_of, until


@contextmanager
def terminal(bundle: Path, **settings: object) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server in a process group of its own, as a shell would make it."""
    given = {f"FAST_VLM_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_convert", "serve", bundle, "--engine", "processes", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | given,
        process_group=0,
        preexec_fn=heed_interrupts,
    )
    try:
        assert process.stderr is not None
        address = next(
            found[0] for line in process.stderr if (found := re.search(r"http://[\d.]+:\d+", line))
        )
        with httpx.Client(base_url=address, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The workers of a server."""
    return [c for c in psutil.Process(process.pid).children() if c.status() != psutil.STATUS_ZOMBIE]


def ask_long(client: httpx.Client) -> Iterator[str]:
    """Pieces of an answer that takes long, as events."""
    body = question("Describe the image.", PICTURES / "00.png", max_tokens=256, stream=True)
    with client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        yield from (line.removeprefix("data: ") for line in response.iter_lines() if "data: " in line)


def test_answers_are_those_of_run_and_health_knows_the_workers(demo_bundle: Path):
    asked = demo_questions()[:3]
    with terminal(demo_bundle, min_workers=2, max_workers=2) as (_, client):
        texts = [text_of(client.post(CHAT, json=question(one.text, PICTURES / one.image))) for one in asked]
        assert texts == answers_of_run(demo_bundle, asked)
        health = client.get("/health").json()
        assert health["scaling"]["workers"] == 2
        metrics = client.get("/metrics").text
        assert re.search(r'fastvlm_workers\{.*state="ready".*\} 2\.0', metrics)
        assert re.search(r'fastvlm_cache_lookups_total\{cache="feature",.*result="miss"\} 3\.0', metrics)


def test_a_killed_worker_ends_its_stream_with_an_error_and_the_next_question_waits_for_another(
    endless_bundle: Path,
):
    with terminal(endless_bundle) as (process, client):
        events = ask_long(client)
        next(events)
        (worker,) = workers(process)
        worker.kill()
        *_, last = events
        assert json.loads(last)["error"]["code"] == "worker_died"
        assert text_of(
            client.post(CHAT, json=question("Describe the image.", PICTURES / "00.png", max_tokens=8))
        )
        assert "fastvlm_worker_restarts_total 1.0" in re.sub(r"\{[^}]*\}", "", client.get("/metrics").text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_lets_the_running_answer_finish(endless_bundle: Path, number: int):
    with terminal(endless_bundle, drain_seconds=60) as (process, client):
        events = ask_long(client)
        next(events)
        children = workers(process)
        os.killpg(process.pid, number)
        *_, end = events
        assert end == "[DONE]"
        assert process.wait(20) == 0
        until(lambda: not any(child.is_running() for child in children), 2)


def test_more_workers_than_memory_holds_are_refused(demo_bundle: Path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fastvlm_convert",
            "serve",
            demo_bundle,
            "--engine",
            "processes",
            "--port",
            "0",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"FAST_VLM_MAX_WORKERS": "16", "FAST_VLM_PREFIX_CACHE_MB": "1000000"},
    )
    assert done.returncode == 2
    assert "error: 16 workers need 10" in done.stderr
    assert "hint: " in done.stderr


def test_where_no_worker_starts_any_more_clients_hear_it_at_once(demo_bundle: Path, tmp_path: Path):
    bundle = copy_bundle(demo_bundle, tmp_path)
    with terminal(bundle) as (process, client):
        weights = next(bundle.glob("onnx/vision*_data"))
        whole = weights.read_bytes()
        weights.rename(tmp_path / "weights")
        (worker,) = workers(process)
        worker.kill()
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/readyz").json() == {"status": "failing"}
        began = time.monotonic()
        response = client.post(CHAT, json=question("Describe the image.", PICTURES / "00.png"))
        assert time.monotonic() - began < 2
        assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
        assert int(response.headers["retry-after"]) >= 1
        weights.write_bytes(whole)
        until(lambda: client.get("/readyz").status_code == 200, 30)
        assert text_of(client.post(CHAT, json=question("Describe the image.", PICTURES / "00.png")))
