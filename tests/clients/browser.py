"""Questions to a bundle, answered by unmodified transformers.js in headless Chromium; and a server."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.clients.node import PACKAGES, need_packages, run_node
from tests.clients.transformers_js import NEW_TOKENS, Task, plain_tasks, without_ends
from tests.commands import ROOT

SERVER = ROOT / "examples" / "web" / "serve.py"
# What onnxruntime-web calls its builds: one with WebAssembly alone, and one with WebGPU besides.
BUILDS = {"plain": "ort-wasm-simd-threaded", "webgpu": "ort-wasm-simd-threaded.asyncify"}


def find_chromium() -> str:
    """The browser; the test is skipped where there is none."""
    need_packages()
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    return found


@contextmanager
def served(bundle: Path, server: Path = SERVER, libraries: Path | None = PACKAGES) -> Iterator[str]:
    """The page with a bundle at an address, as docs/web.md has it served."""
    command = [sys.executable, server, bundle, "--port", "0"]
    command += ["--libraries", libraries] if libraries else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            address, _, _ = process.stdout.readline().partition(" ")
            yield f"{address}/"
        finally:
            process.terminate()


def load_in_browser(build: str, **options: Any) -> dict[str, Any]:
    """One way to load a bundle: a build of onnxruntime-web, and the options of `from_pretrained`."""
    runtime = {kind: f"/libraries/onnxruntime-web/dist/{BUILDS[build]}.{kind}" for kind in ("mjs", "wasm")}
    return {"runtime": runtime, "options": options}


def ask_browser(
    bundle: Path,
    loads: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
    folder: Path,
    *,
    gpu: bool = False,
    max_new_tokens: int = NEW_TOKENS,
) -> list[dict[str, Any]]:
    """For each load: its `error` or its `answers`, without the end token; and the `features` of the GPU.

    Args:
        bundle: What to serve.
        loads: See `load_in_browser`.
        tasks: What to ask.
        folder: For files that both sides read.
        gpu: Whether the browser gets the software adapter.
        max_new_tokens: Tokens of an answer, at most.
    """
    output = folder / "browser.json"
    with served(bundle) as url:
        job = {
            "chromium": find_chromium(),
            "gpu": gpu,
            "url": url,
            "loads": loads,
            "tasks": plain_tasks(tasks, bundle, folder),
            "max_new_tokens": max_new_tokens,
            "output": str(output),
        }
        run_node("browser_answers.mjs", json.dumps(job))
    results = json.loads(output.read_text())["results"]
    return [{**result, "answers": without_ends(result["answers"], bundle)} for result in results]
