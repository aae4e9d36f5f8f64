"""`fastvlm-convert serve` as a process: what it prints, how it ends, what it refuses to start with."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx
import pytest

from fastvlm_convert.serve.served_bundle import open_served_bundle
from fastvlm_convert.serve.server import listen, run_server
from fastvlm_convert.serve.service import make_service
from fastvlm_convert.serve.settings import Settings
from tests.bundles import copy_bundle, graph_path
from tests.cli.conftest import Cli
from tests.serve.scripted_engine import ScriptedEngine
from tests.serve.servers import CHAT, PICTURES, question, serving, text_of, until

ROOT = Path(__file__).parents[2]


def heed_interrupts() -> None:
    """Shells let what they start in the background ignore Ctrl-C, and so the tests, and what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def process(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own, killed if it is still there."""
    command = [sys.executable, "-m", "fastvlm_convert", "serve", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=heed_interrupts,
    ) as server:
        try:
            yield server
        finally:
            server.kill()


def url_of(server: subprocess.Popen[str]) -> str:
    """What it prints with --quiet once it is ready."""
    assert server.stdout is not None
    line = server.stdout.readline().strip()
    assert line.startswith("http://127.0.0.1:"), (line, server.stderr.read() if server.stderr else "")
    return line


def test_it_answers_as_run_does_and_ends_with_0_at_a_signal(demo_bundle, cli: Cli):
    picture = PICTURES / "06.png"
    expected = cli("run", demo_bundle, picture, "What is in the picture?").out.strip()
    with process(demo_bundle, "--port", 0, "--quiet") as server:
        url = url_of(server)
        body = question("What is in the picture?", picture)
        assert text_of(httpx.post(f"{url}{CHAT}", json=body, timeout=30)) == expected
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=20)
        assert (server.returncode, out, err) == (0, "", "")


def test_it_prints_a_document_when_it_is_ready(demo_bundle):
    with process(f"small={demo_bundle}", "--port", 0, "--json") as server:
        assert server.stdout is not None
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(server.stdout.readline())
        document = json.loads("".join(lines))
        assert document["schema"] == "fastvlm-convert/serve"
        assert document["models"] == ["small"]
        models = httpx.get(f"{document['url']}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["small"]


def test_headers_without_an_end_are_refused(demo_bundle):
    with process(demo_bundle, "--port", 0, "--quiet") as server:
        port = int(url_of(server).rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ")
            with pytest.raises(ConnectionError):  # noqa: PT012
                for _ in range(1000):
                    client.sendall(b"x" * 100_000)


def test_it_does_not_load_torch(demo_bundle):
    code = (
        "import sys, threading, time; from fastvlm_convert.cli.main import main\n"
        "def look():\n"
        "    time.sleep(6)\n"
        "    print(sorted({'torch', 'onnx', 'coremltools', 'ray'} & set(sys.modules)), flush=True)\n"
        "threading.Thread(target=look, daemon=True).start()\n"
        f"main(['serve', {str(demo_bundle)!r}, '--port', '0', '--quiet'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as server:
        assert server.stdout is not None
        assert url_of(server)
        assert server.stdout.readline() == "[]\n"
        server.terminate()


SLOW = {"FAST_VLM_SLOTS": "1", "FAST_VLM_CACHE_ENABLED": "false", "FAST_VLM_DRAIN_SECONDS": "25"}


def ask_in_background(url: str, count: int) -> tuple[list[threading.Thread], list[httpx.Response]]:
    """Several long questions at once; one slot answers one after the other."""
    replies: list[httpx.Response] = []

    def ask(number: int) -> None:
        body = question(f"Describe the image. {number}", PICTURES / "00.png", temperature=2.0, seed=number)
        replies.append(httpx.post(f"{url}{CHAT}", json=body, timeout=30))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    return threads, replies


def test_a_signal_drains_what_was_asked_is_answered_and_what_is_new_refused(endless_bundle):
    with process(endless_bundle, "--port", 0, "--quiet", **SLOW) as server:
        url = url_of(server)
        threads, replies = ask_in_background(url, 6)
        until(lambda: gauge(url, "running") == 1 and gauge(url, "waiting") == 5)
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
        assert httpx.get(f"{url}/livez").status_code == 200
        refused = httpx.post(f"{url}{CHAT}", json=question("Is it red?"))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join(30)
        assert [reply.status_code for reply in replies] == [200] * 6
        assert server.wait(25) == 0


def metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics").text


def gauge(url: str, of: Literal["running", "waiting"]) -> float:
    line = next(line for line in metrics(url).splitlines() if line.startswith(f"fastvlm_requests_{of}{{"))
    return float(line.rpartition(" ")[2])


def test_what_is_not_done_when_the_time_is_up_hears_of_it(endless_bundle):
    with process(
        endless_bundle, "--port", 0, "--quiet", **{**SLOW, "FAST_VLM_DRAIN_SECONDS": "0.2"}
    ) as server:
        url = url_of(server)
        threads, replies = ask_in_background(url, 30)
        until(lambda: gauge(url, "running") == 1)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
        assert time.monotonic() - began < 5
        for thread in threads:
            thread.join(10)
        assert {reply.json()["error"]["code"] for reply in replies if reply.status_code != 200} == {
            "draining"
        }


def test_a_second_signal_ends_at_once(demo_bundle):
    with process(demo_bundle, "--port", 0, "--quiet", **SLOW) as server:
        url = url_of(server)
        body = json.dumps({**question("x", PICTURES / "00.png"), "temperature": 2})
        sock = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        sock.sendall(f"{head}\r\n{body[:-5]}".encode())  # a request that never ends
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
        server.send_signal(signal.SIGINT)
        assert server.wait(2) == 130
        sock.close()


def test_while_bundles_are_loaded_it_lives_and_is_not_ready(demo_bundle):
    gate = threading.Event()

    class Loading(ScriptedEngine):
        async def start(self) -> None:
            await asyncio.to_thread(gate.wait)
            await super().start()

    with serving(demo_bundle, engine=Loading(), waits=False) as server:
        until(lambda: server.client.get("/livez").status_code == 200)
        assert server.client.get("/readyz").status_code == 503
        refused = server.chat(question())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.client.get("/health").json()["status"] == "unhealthy"
        gate.set()
        until(lambda: server.client.get("/readyz").status_code == 200)
        assert text_of(server.chat(question())) == "It is red."


def test_a_port_that_is_taken_is_an_error_of_one_line(demo_bundle, cli: Cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = cli("serve", demo_bundle, "--port", taken.getsockname()[1])
    assert result.code == 2
    assert result.err.count("\n") == 2
    assert "Address already in use" in result.err
    assert "--port 0" in result.err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "missing argument 'BUNDLE'"),
        (["nowhere"], "nowhere"),
        (["{bundle}", "{bundle}"], "two bundles are called"),
        (["a={bundle}", "b={bundle}", "--weight", "a=1"], "no weight for b"),
        (["{bundle}", "--target", "coreml"], "coreml"),
        (["{bundle}", "--engine", "magic"], "engine"),
        (["{bundle}", "--settings", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_served_is_an_error_of_the_command_line(demo_bundle, cli: Cli, arguments, what):
    given = [argument.format(bundle=demo_bundle) for argument in arguments]
    result = cli("serve", *given, "--port", 0)
    assert result.code == 2
    assert what in result.err
    assert "Traceback" not in result.err


def test_a_bundle_that_was_changed_is_not_served(demo_bundle, cli: Cli, tmp_path: Path):
    copy = copy_bundle(demo_bundle, tmp_path)
    path = graph_path(copy, "decoder")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = cli("serve", copy, "--port", 0)
    assert result.code == 2
    assert "has other content than the manifest says" in result.err
    assert "Traceback" not in result.err


def test_settings_are_shown_with_their_origins(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAST_VLM_SLOTS", "3")
    document = cli("serve", "--show-settings", "--port", 9, "--json").document
    found = {setting["name"]: (setting["value"], setting["origin"]) for setting in document["settings"]}
    assert found["slots"] == (3, "environment FAST_VLM_SLOTS")
    assert found["port"] == (9, "command line, --port")
    assert found["max_queue"] == (64, "default")


def test_a_mistake_of_ours_while_loading_ends_the_server(demo_bundle):
    class Mistaken(ScriptedEngine):
        async def start(self) -> None:
            raise IndexError("a mistake of ours")

    served = open_served_bundle(demo_bundle)
    service = make_service(Settings(), [served], lambda *_: Mistaken())
    said = []
    with listen("127.0.0.1", 0) as sock, pytest.raises(IndexError, match="a mistake of ours"):
        run_server(service, sock, lambda: said.append("ready"))
    assert said == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems map files otherwise")
def test_a_crash_of_the_runtime_is_told(demo_bundle, tmp_path):
    bundle = copy_bundle(demo_bundle, tmp_path)
    with process(bundle, "--port", 0, "--quiet") as server:
        url = url_of(server)
        for weights in bundle.glob("onnx/*_data"):
            os.truncate(weights, 0)
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{url}{CHAT}", json=question("What is it?", PICTURES / "06.png"), timeout=30)
        assert "Fatal Python error: Bus error" in server.communicate(timeout=20)[1]
