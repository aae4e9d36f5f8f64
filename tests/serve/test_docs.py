"""docs/serve.md keeps its word: its commands and its code run, its names are those of the code."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.serve.errors import RequestError
from fastvlm_convert.serve.page import PATHS
from fastvlm_convert.serve.settings import PREFIX, Settings
from tests.commands import NETWORK, ROOT
from tests.settings_table import DOCUMENT, stored, table

TEXT = DOCUMENT.read_text(encoding="utf-8")
TOOL = (sys.executable, "-m", "fastvlm_convert")
PICTURE = ROOT / "checkpoints" / "fastvlm-demo" / "check_images" / "00.png"
ADDRESS = "localhost:8000"


def blocks(language: str) -> list[str]:
    """What stands in fences of a language and needs no network."""
    found = re.finditer(rf"(?:({re.escape(NETWORK)})\n)?^```{language}\n(.*?)^```$", TEXT, re.M | re.S)
    return [block[2] for block in found if not block[1]]


def test_the_settings_are_those_of_the_code():
    assert stored() == table(), "docs/serve.md is out of date: run `make docs`"


def test_every_setting_that_is_named_exists():
    named = {name.removeprefix(PREFIX).lower() for name in re.findall(rf"{PREFIX}[A-Z_]*[A-Z]", TEXT)}
    assert named - {"image_size", "bits"} == set(Settings.model_fields)  # these are named as none


def test_every_status_of_an_error_is_explained():
    """But 499, which nobody reads."""
    explained = {int(status) for status in re.findall(r"^\| (\d{3}) \|", TEXT, re.M)}
    kinds = {kind.status for kind in RequestError.__subclasses__()}
    assert explained == {int(status) for status in kinds}


def test_the_page_is_where_the_document_says():
    assert "`GET /` | the page, and its files below `/page/`" in TEXT
    assert all(path == "/" or path.startswith("/page/") for path in PATHS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """What the first command makes, elsewhere."""
    export, _ = blocks("sh")[0].splitlines()
    target = tmp_path_factory.mktemp("served") / "served"
    words = export.replace("out/served", str(target)).split()
    subprocess.run([*TOOL, *words[1:]], cwd=ROOT, check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def address(bundle) -> Iterator[str]:
    """Where the second command serves it, on another port; at last it drains and exits with 0."""
    _, serve = blocks("sh")[0].splitlines()
    words = [*serve.replace("out/served", str(bundle)).split(), "--port", "0"]
    with subprocess.Popen([*TOOL, *words[1:]], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = ""
        while not (found := re.search(r"http://(127\.0\.0\.1:\d+)", told)):
            line = process.stderr.readline()
            assert line, told
            told += line
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def answer(bundle) -> str:
    """What `run` says."""
    stream = load_bundle(bundle).ask(PICTURE, "Describe the image.")
    return "".join(stream)


@pytest.mark.slow
def test_the_answer_to_curl_is_that_of_run(address, answer):
    curl = blocks("sh")[1]
    assert ADDRESS in curl
    done = subprocess.run(
        ["bash", "-c", curl.replace(ADDRESS, address)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    reply = json.loads(done.stdout)
    assert reply["choices"][0]["message"]["content"] == answer
    shown = json.loads(blocks("json")[0])
    assert set(shown) == set(reply)
    assert set(shown["timings"]) == set(reply["timings"])
    assert set(shown["usage"]) == set(reply["usage"])
    assert shown["model"] == reply["model"]


@pytest.mark.slow
def test_the_code_for_openais_client_prints_it(address, answer):
    code = blocks("python")[0].replace(ADDRESS, address)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == answer.strip()
