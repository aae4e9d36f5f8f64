"""How much more does `serve` answer than thirty lines of FastAPI around ONNX Runtime, and does it last?

    python -m benchmarks.serve_load [BUNDLE] [--users 40] [--rounds 3] [--seconds 20] [--minutes 30]

Users in a closed loop: each sends its next request when the last is answered. Both servers run at the same
time on one machine, and take turns within every round, so that what disturbs one disturbs the other. Three
kinds of requests: about pictures that were never seen, new questions about eight pictures, and the same
questions about them again. Then `serve` alone gets a mix of all three for some minutes.

Peer: benchmarks/plain_server.py. Limits: no errors; 1.8, 4 and 50 times the peer's requests a second; memory
grows by less than 1 MB in 10 minutes once caches are full; at most 60 MB more than `run` when ready.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from PIL import Image

from benchmarks.http_user import HttpUser, free_port, until_answered
from fastvlm_convert.demo.samples import HELD_OUT_SEED, make_sample
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe, without_data

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "checkpoints" / "fastvlm-demo"
MAX_TOKENS = 64
NUM_FAMILIAR = 8
QUESTION = "Describe the image."
LIMITS = {"distinct pictures": 1.8, "repeated pictures": 4.0, "repeated questions": 50.0}
MAX_EXTRA_MB = 60.0
MAX_SLOPE_MB = 1.0
SAMPLE_S = 2.0
MB = 1e6


@dataclass
class Server:
    """A server that runs.

    Attributes:
        name: What it is called in tables.
        port: Where it listens, on this machine.
        process: Its process.
        ready_s: Seconds from its start until it was ready.
    """

    name: str
    port: int
    process: psutil.Process
    ready_s: float

    def memory_mb(self) -> float:
        """Resident memory, of its children too."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family) / MB

    def cpu_s(self) -> float:
        """Processor seconds so far."""
        times = self.process.cpu_times()
        return times.user + times.system


@dataclass
class Load:
    """What came of a load on a server.

    Attributes:
        seconds: How long it lasted.
        cpu_s: Processor time that the server took for it.
        latencies_ms: Of requests that were answered.
        errors: Requests that were not, by status.
    """

    seconds: float = 0.0
    cpu_s: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return len(self.latencies_ms) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Processor milliseconds an answer."""
        return 1000 * self.cpu_s / max(1, len(self.latencies_ms))

    def percentile(self, percent: int) -> float:
        """Of the latencies, ms; NaN where nothing was answered."""
        if len(self.latencies_ms) < 2:
            return float("nan")
        return statistics.quantiles(self.latencies_ms, n=100, method="inclusive")[percent - 1]


Rounds = dict[str, list[dict[str, Load]]]
"""By kind of request: for each round, the load of each server by its name."""
Memory = list[tuple[float, float]]
"""Seconds and MB."""


def start(name: str, command: Sequence[str | Path], port: int, path: str, log: Path) -> Server:
    """A server, once it is ready."""
    began = time.monotonic()
    with log.open("wb") as output:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAST_VLM_RATE_LIMIT_PER_MINUTE": "0"}
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    asyncio.run(until_answered(port, path, process))
    return Server(name, port, psutil.Process(process.pid), time.monotonic() - began)


def png(image: Image.Image) -> str:
    """A data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body(picture: str, question: str) -> bytes:
    """A request for an answer about a picture."""
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": question},
    ]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, "temperature": 0}
    return json.dumps(request).encode()


class Requests:
    """Bodies of requests, for one server. `distinct` hands out pictures that are made beforehand."""

    def __init__(self, stock: Sequence[str], familiar: Sequence[str]) -> None:
        self._stock = iter(stock)
        self._familiar = itertools.cycle(familiar)
        self._number = itertools.count(1)

    def distinct(self) -> bytes:
        """About a picture that the server has not seen."""
        return body(next(self._stock), QUESTION)

    def repeated_pictures(self) -> bytes:
        """A new question about one of eight pictures."""
        return body(next(self._familiar), f"Describe the image, please ({next(self._number)}).")

    def repeated_questions(self) -> bytes:
        """An old question about one of eight pictures."""
        return body(next(self._familiar), QUESTION)

    def mixed(self) -> bytes:
        """One of the three in turn."""
        kinds = (self.distinct, self.repeated_pictures, self.repeated_questions)
        return kinds[next(self._number) % 3]()


def pictures(seed: int) -> Iterator[str]:
    """Data URLs without end: drawn pictures, each with a pixel of its own, so that none is like another."""
    drawn = [make_sample(seed + index).image.convert("RGB") for index in range(NUM_FAMILIAR)]
    for number in itertools.count():
        image = drawn[number % len(drawn)].copy()
        image.putpixel((number % image.width, number // image.width % image.height), (number % 251, 7, 99))
        yield png(image)


async def load(server: Server, make: Callable[[], bytes], users: int, seconds: float) -> Load:
    """Keep a server busy for a while."""
    result = Load()
    began, cpu_before = time.monotonic(), server.cpu_s()

    async def use() -> None:
        async with HttpUser(server.port) as user:
            while time.monotonic() - began < seconds:
                request = make()
                sent = time.perf_counter()
                status = (await user.post("/v1/chat/completions", request))[0]
                if status == 200:
                    result.latencies_ms.append(1000 * (time.perf_counter() - sent))
                else:
                    result.errors[str(status)] += 1

    await asyncio.gather(*(use() for _ in range(users)))
    result.seconds, result.cpu_s = time.monotonic() - began, server.cpu_s() - cpu_before
    return result


async def check_equal(servers: Sequence[Server], familiar: Sequence[str]) -> None:
    """Both servers say the same, or nothing is worth comparing."""
    for picture in familiar:
        texts = []
        for server in servers:
            async with HttpUser(server.port) as user:
                status, reply = await user.post("/v1/chat/completions", body(picture, QUESTION))
                assert status == 200, reply
                texts.append(json.loads(reply)["choices"][0]["message"]["content"].strip())
        assert len(set(texts)) == 1, texts


def compare(servers: Sequence[Server], sources: dict[str, Requests], given: argparse.Namespace) -> Rounds:
    """By kind of request, what each round brought; the servers take turns, and the order alternates."""
    results: Rounds = {kind: [] for kind in LIMITS}
    for number in range(given.rounds):
        for kind in LIMITS:
            one: dict[str, Load] = {}
            for server in servers if number % 2 else reversed(servers):
                source = sources[server.name]
                make = {
                    "distinct pictures": source.distinct,
                    "repeated pictures": source.repeated_pictures,
                    "repeated questions": source.repeated_questions,
                }[kind]
                one[server.name] = asyncio.run(load(server, make, given.users, given.seconds))
            results[kind].append(one)
    return results


def print_comparison(results: Rounds) -> bool:
    """A table; whether all limits are kept."""
    print(f"{'requests':20} {'server':6} {'per s':>8} {'CPU ms':>8} {'p50':>8} {'p95':>8} {'p99':>8} errors")
    kept = True
    for kind, rounds in results.items():
        for name in rounds[0]:
            all_rounds = Load(
                sum(one[name].seconds for one in rounds),
                sum(one[name].cpu_s for one in rounds),
                [latency for one in rounds for latency in one[name].latencies_ms],
                sum((one[name].errors for one in rounds), Counter()),
            )
            print(f"{kind:20} {name:6} {_figures(all_rounds)}")
            kept &= not (name == "serve" and all_rounds.errors)
        ratios = sorted(one["serve"].per_second / max(1e-9, one["plain"].per_second) for one in rounds)
        by_cpu = statistics.median(one["plain"].cpu_ms / max(1e-9, one["serve"].cpu_ms) for one in rounds)
        median = statistics.median(ratios)
        kept &= median >= LIMITS[kind]
        print(
            f"{kind:20} ratio  {median:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}), limit {LIMITS[kind]:g}; "
            f"in processor time {by_cpu:.1f}"
        )
    return kept


def _figures(found: Load) -> str:
    latencies = " ".join(f"{found.percentile(percent):8.1f}" for percent in (50, 95, 99))
    return f"{found.per_second:8.1f} {found.cpu_ms:8.1f} {latencies} {dict(found.errors) or 0}"


async def endure(
    server: Server, make: Callable[[], bytes], users: int, minutes: float
) -> tuple[Load, Memory]:
    """A long load, and what memory was all along."""
    memory: Memory = []
    working = asyncio.create_task(load(server, make, users, 60 * minutes))
    began = time.monotonic()
    while not working.done():
        memory.append((time.monotonic() - began, server.memory_mb()))
        await asyncio.wait([working], timeout=SAMPLE_S)
    return await working, memory


def slope_mb(memory: Memory) -> float:
    """MB in 10 minutes, by least squares over the second half, when caches are full."""
    late = memory[len(memory) // 2 :]
    if len(late) < 3:
        return float("nan")
    return 600 * statistics.linear_regression(*zip(*late, strict=True)).slope


def memory_of_run(bundle: Path, folder: Path) -> float:
    """Most resident memory of `run` with one question, MB."""
    picture = folder / "picture.png"
    make_sample(HELD_OUT_SEED).image.save(picture)
    command = [sys.executable, "-m", "fastvlm_convert", "run", bundle, "--target", "onnx", picture, QUESTION]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MB


def export_demo(folder: Path) -> Path:
    """The demo checkpoint in four bits, uncalibrated."""
    recipe = without_data(load_recipe("int4"))
    export(DEMO, folder / "demo", recipe=recipe, targets="onnx")
    return folder / "demo"


def measure(given: argparse.Namespace, folder: Path, servers: list[Server]) -> bool:
    """Everything, printed; whether all limits are kept."""
    bundle = (given.bundle or export_demo(folder)).resolve()
    ours, theirs = free_port(), free_port()
    command = ["fastvlm_convert", "serve", f"demo={bundle}", "--target", "onnx", "--port", str(ours)]
    servers.append(start("serve", command, ours, "/readyz", folder / "serve.log"))
    ready_mb, run_mb = servers[0].memory_mb(), memory_of_run(bundle, folder)
    plain = ["benchmarks.plain_server", bundle, str(theirs)]
    servers.append(start("plain", plain, theirs, "/openapi.json", folder / "plain.log"))
    print(f"ready after {servers[0].ready_s:.1f} s (plain {servers[1].ready_s:.1f} s)")
    print(
        f"memory: ready {ready_mb:.0f} MB, run {run_mb:.0f} MB, limit of the difference {MAX_EXTRA_MB:g} MB"
    )
    familiar = list(itertools.islice(pictures(HELD_OUT_SEED), NUM_FAMILIAR))
    asyncio.run(check_equal(servers, familiar))
    stock = list(itertools.islice(pictures(HELD_OUT_SEED + NUM_FAMILIAR), given.stock))
    endless = pictures(HELD_OUT_SEED + 2 * NUM_FAMILIAR)
    sources = {one.name: Requests(itertools.chain(stock, endless), familiar) for one in servers}
    kept = print_comparison(compare(servers, sources, given)) and ready_mb - run_mb <= MAX_EXTRA_MB
    if given.minutes:
        servers[1].process.terminate()
        found, memory = asyncio.run(endure(servers[0], sources["serve"].mixed, given.users, given.minutes))
        print(f"{given.minutes:g} minutes mixed      {_figures(found)}")
        slope = slope_mb(memory)
        print(f"memory: {memory[0][1]:.0f} to {memory[-1][1]:.0f} MB; over the second half of the time")
        print(f"        {slope:+.2f} MB in 10 minutes, limit {MAX_SLOPE_MB:g}")
        kept &= not found.errors and not slope >= MAX_SLOPE_MB
    return kept


def main() -> int:
    """Print figures; 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "bundle", type=Path, nargs="?", help="the demo in four bits, exported now, if omitted"
    )
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--minutes", type=float, default=0, help="of the long load; 0 leaves it out")
    parser.add_argument(
        "--stock", type=int, default=2000, help="pictures that are made before the first round"
    )
    given = parser.parse_args()
    servers: list[Server] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            kept = measure(given, Path(folder), servers)
        finally:
            for server in servers:
                if server.process.is_running():
                    server.process.terminate()
    print("all limits are kept" if kept else "a limit is not kept")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
