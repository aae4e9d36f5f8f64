"""Servers to test against: the real application behind the real uvicorn, on a free port of this machine."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from fastvlm_convert.serve.app import make_app
from fastvlm_convert.serve.engine import Engine
from fastvlm_convert.serve.engines.choice import make_engine
from fastvlm_convert.serve.served_bundle import ServedBundle, open_served_bundle
from fastvlm_convert.serve.server import listen, server_config
from fastvlm_convert.serve.service import Service, make_service
from fastvlm_convert.serve.settings import Settings

CHAT = "/v1/chat/completions"
PICTURES = Path(__file__).parents[2] / "checkpoints" / "fastvlm-demo" / "check_images"


@dataclass
class Server:
    """A server that runs.

    Attributes:
        url: Where, without a path.
        service: Its inside; only to be looked at.
        client: A client of it.
    """

    url: str
    service: Service
    client: httpx.Client

    def chat(self, body: dict[str, Any], **how: Any) -> httpx.Response:
        """Ask."""
        return self.client.post(CHAT, json=body, **how)

    def metric(self, name: str) -> float:
        """A sample of `/metrics`; 0 where there is none."""
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)


@contextmanager
def serving(
    *bundles: Path | ServedBundle,
    engine: Engine | dict[str, Engine] | None = None,
    waits: bool = True,
    weights: dict[str, float] | None = None,
    **settings: Any,
) -> Iterator[Server]:
    """Serve bundles with an engine of the test's, or one by name, or with their own."""

    def make(bundle: ServedBundle, *others: Any) -> Engine:
        if engine is None:
            return make_engine(bundle, *others)
        return engine[bundle.name] if isinstance(engine, dict) else engine

    served = [open_served_bundle(one) if isinstance(one, Path) else one for one in bundles]
    made = make_service(Settings(**settings), served, make, weights)
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(server_config(make_app(made)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread.start()
    try:
        with httpx.Client(base_url=url, timeout=20) as client:
            if waits:
                until(lambda: client.get("/readyz").status_code == 200)
            yield Server(url, made, client)
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something to become true.

    Raises:
        AssertionError: It does not.
    """
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.005)


def data_url(picture: Path) -> str:
    """A picture's file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def question(text: str = "Describe the image.", *pictures: Path, **fields: Any) -> dict[str, Any]:
    """A request's body: pictures first, as `run` puts them."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(path)}} for path in pictures
    ]
    content.append({"type": "text", "text": text})
    return {"messages": [{"role": "user", "content": content}], **fields}


def text_of(response: httpx.Response) -> str:
    """The answer."""
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def events_of(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, the last word as it is."""
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


async def settle(seconds: float = 0.05) -> None:
    """Let other tasks run."""
    await asyncio.sleep(seconds)
