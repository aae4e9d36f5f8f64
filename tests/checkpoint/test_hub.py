"""Models by their id, from a server on this machine that answers as Hugging Face does, and from the cache."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from fastvlm_convert.checkpoint.hub import is_model_id
from tests.checkpoints import GOLDEN, LLAVA, copy_checkpoint, read_tensors, remove_weights

ID, COMMIT = "tiny/llava", "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nlicense: other\nlicense_name: apple-amlr\nlicense_link: LICENSE\n---\n# Tiny\n"
NOT_NEEDED = ("llava_qwen.py", "picture.png", "onnx/model.safetensors")


class Hub(ThreadingHTTPServer):
    """Serves one folder as a model; notes what was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.asked: list[str] = []
        self.gated = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Tests read `asked` instead."""

    def do_HEAD(self) -> None:
        self.answer(is_head=True)

    def do_GET(self) -> None:
        self.answer(is_head=False)

    def answer(self, is_head: bool) -> None:
        path = self.path.partition("?")[0]
        files = {p.relative_to(self.server.folder).as_posix(): p for p in self.server.folder.rglob("*")}
        files = {name: p.read_bytes() for name, p in sorted(files.items()) if p.is_file()}
        self.server.asked.append(path)
        api, raw = f"/api/models/{ID}/", f"/{ID}/resolve/"
        status, body, headers = 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        if self.server.gated and ID in path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif path in (f"{api}revision/main", f"{api}revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in files]
            value = {"id": ID, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            status, body, headers = 200, json.dumps(value).encode(), {}
        elif path.startswith(f"{api}revision/"):
            headers = {"X-Error-Code": "RevisionNotFound"}
        elif path.startswith(f"{api}tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            status, body, headers = 200, json.dumps(entries).encode(), {}
        elif path.startswith(raw) and (name := path.removeprefix(raw).partition("/")[2]) in files:
            body = files[name]
            status, headers = 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path):
    folder = copy_checkpoint(LLAVA, tmp_path / "served")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("research only")
    (folder / "onnx").mkdir()
    for name in NOT_NEEDED:
        (folder / name).write_bytes(b"not needed")
    server = Hub(folder)
    yield server
    server.stop()


@pytest.fixture
def inspect(hub, tmp_path):
    """Runs `inspect` with the server as Hugging Face and a cache of its own."""

    def run(name, *options, **environment):
        settings = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment,
        }  # fmt: skip
        settings.pop("HF_TOKEN", None)
        call = [sys.executable, "-m", "fastvlm_convert", "inspect", name, "--json", *options]
        root = Path(__file__).parents[2]
        settings["PYTHONPATH"] = str(root)
        done = subprocess.run(
            call, env=settings, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        return done.returncode, json.loads(done.stdout), done.stderr

    return run


NOTE = f"{ID} at revision {COMMIT[:12]}; license: apple-amlr, LICENSE"


def test_a_model_is_downloaded_once_and_then_read_from_the_cache(hub, inspect):
    code, document, printed = inspect(ID)
    assert (code, printed) == (0, "")  # no bar reaches a file
    assert document["layout"] == "llava_qwen2"
    assert document["license"] == "LICENSE"
    assert NOTE in document["notes"]
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt", "LICENSE"} <= fetched
    assert not fetched & {name.rpartition("/")[2] for name in NOT_NEEDED[:2]}
    assert not any("/onnx/" in path for path in hub.asked)
    hub.asked.clear()
    assert inspect(f"{ID}@{COMMIT}")[1]["parameters"] == document["parameters"]
    assert not [path for path in hub.asked if path.endswith("model.safetensors")]
    hub.stop()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        code, again, _ = inspect(ID, **environment)
        assert code == 0
        assert {**again, "checkpoint": None} == {**document, "checkpoint": None}


def test_torch_files_are_taken_where_there_are_no_others(hub, inspect):
    tensors = read_tensors(hub.folder)
    remove_weights(hub.folder)
    torch.save(tensors, hub.folder / "pytorch_model.bin")
    code, document, _ = inspect(ID)
    assert code == 0
    assert document["stored_bytes"]["float32"] > 0


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("no/such", "model 'no/such' is not on Hugging Face, nor is there such a folder", "hf auth login"),
        (f"{ID}@v9", "has no revision 'v9'", f"https://huggingface.co/{ID}/commits"),
    ],
)
def test_what_is_not_there_is_said(name, message, hint, inspect):
    code, document, _ = inspect(name)
    assert code == 2
    assert document["error"]["code"] == "checkpoint"
    assert message in document["error"]["message"]
    assert hint in document["error"]["hint"]


def test_a_license_that_must_be_accepted_is_said(hub, inspect):
    hub.gated = True
    code, document, _ = inspect(ID)
    assert code == 2
    assert "asks to accept its license first" in document["error"]["message"]
    assert f"https://huggingface.co/{ID}" in document["error"]["hint"]


def test_without_cache_and_network_the_next_step_is_said(hub, inspect):
    hub.stop()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        code, document, _ = inspect(ID, **environment)
        assert code == 2
        assert (
            "is not in Hugging Face's cache, which is all that can be reached" in document["error"]["message"]
        )
        assert f"hf download {ID} --local-dir FOLDER" in document["error"]["hint"]


def test_what_is_local_is_not_looked_up(hub, inspect, tmp_path):
    copy_checkpoint(LLAVA, tmp_path / "mine")
    assert inspect(f"mine/{LLAVA}")[0] == 0
    code, document, _ = inspect("mine/mispelt")
    assert code == 2
    assert "there is no such checkpoint" in document["error"]["message"]
    assert hub.asked == []


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("apple/FastVLM-0.5B", True), ("apple/FastVLM-0.5B@refs/pr/1", True), ("a/b@main", True),
        ("apple", False), ("./apple/FastVLM", False), ("/apple/FastVLM", False), ("../a/b", False),
        ("a/b/c", False), ("a/b@", False), ("~/models/x", False), ("a//b", False), ("", False),
        (str(GOLDEN / LLAVA), False),
    ],
)  # fmt: skip
def test_what_looks_like_an_id(text, is_id):
    assert is_model_id(text) == is_id
