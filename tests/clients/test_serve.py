"""The server of the page: headers, sizes, addresses, and nothing outside its folders."""

import http.client
import json
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.clients.browser import SERVER, served
from tests.clients.node import HERE

WEIGHTS = b"weights"


@pytest.fixture
def bundle(tmp_path) -> Path:
    folder = tmp_path / "my bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "fastvlm_manifest.json").write_text("{}")
    (folder / "onnx" / "graph.onnx").write_bytes(WEIGHTS)
    (tmp_path / "secret.txt").write_text("secret")
    return folder


@pytest.fixture
def url(bundle) -> Iterator[str]:
    with served(bundle, libraries=None) as address:
        yield address


def get(url: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response, response.read()


def model_path(url: str) -> str:
    return f"/{json.loads(get(url, '/settings.json')[1])['model']}"


def test_the_page_is_isolated_and_its_libraries_come_from_a_network(url):
    response, page = get(url, "/")
    assert (response.status, b"<title>Ask about a picture</title>" in page) == (200, True)
    assert response.getheader("Cross-Origin-Opener-Policy") == "same-origin"
    assert response.getheader("Cross-Origin-Embedder-Policy") == "require-corp"
    assert json.loads(get(url, "/settings.json")[1])["library"].startswith("https://cdn.jsdelivr.net/npm/")


def test_a_bundle_has_an_address_that_changes_with_it(url, bundle):
    first = model_path(url)
    assert first.startswith("/my-bundle-")
    assert get(url, f"{first}/onnx/graph.onnx")[1] == WEIGHTS
    (bundle / "fastvlm_manifest.json").write_text('{"another": 1}')
    with served(bundle, libraries=None) as other:
        assert model_path(other) != first


def test_sizes_are_said_without_sending_the_file(url):
    response, body = get(url, f"{model_path(url)}/onnx/graph.onnx", Range="bytes=0-0")
    assert (response.status, response.getheader("Content-Range"), len(body)) == (206, "bytes 0-0/7", 1)
    assert get(url, f"{model_path(url)}/onnx/none.onnx", Range="bytes=0-0")[0].status == 404


def test_one_connection_serves_many_files(url):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    sockets = set()
    weights = f"{model_path(url)}/onnx/graph.onnx"
    for path, headers in (
        ("/settings.json", {}),
        (weights, {"Range": "bytes=0-0"}),
        (weights, {}),
        ("/", {}),
    ):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        assert response.status == (206 if headers else 200)
        response.read()
        sockets.add(connection.sock)
    assert len(sockets) == 1
    assert None not in sockets


def test_many_connections_wait_while_it_is_busy(bundle):
    """It accepts none here, as on a machine that does not let it run; the 5 of socketserver time out."""
    make_server = runpy.run_path(str(SERVER))["make_server"]
    with make_server(bundle, port=0) as server, ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(server.server_address, timeout=2))


@pytest.mark.parametrize("tail", ["/../secret.txt", "/%2e%2e/secret.txt", "/onnx/../../secret.txt"])
def test_nothing_outside_the_bundle_is_served(url, tail):
    response, body = get(url, model_path(url) + tail)
    assert (response.status, b"secret" in body) == (404, False)


@pytest.mark.parametrize("wrong", ["no manifest", "no libraries"])
def test_what_is_missing_is_said(bundle, tmp_path, wrong):
    given = [tmp_path] if wrong == "no manifest" else [bundle, "--libraries", tmp_path]
    done = subprocess.run(
        [sys.executable, SERVER, *given], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}")
    assert "Traceback" not in done.stderr


def test_a_network_gives_the_versions_that_are_tested():
    pinned = json.loads((HERE / "package.json").read_text())["dependencies"]
    packages = json.loads((HERE / "package-lock.json").read_text())["packages"]
    settings = (SERVER.parent / "settings.json").read_text()
    used = dict(re.findall(r"npm/((?:@\w+/)?[\w-]+)@([\w.-]+)/", settings))
    assert used == {name: pinned[name] for name in ("@huggingface/transformers", "onnxruntime-web")}
    library = packages["node_modules/@huggingface/transformers"]["dependencies"]
    assert library["onnxruntime-web"] == pinned["onnxruntime-web"]
    assert not [name for name, package in packages.items() if "resolved" in package]  # of any one registry
