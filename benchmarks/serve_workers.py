"""Threads of the server against worker processes, under users who ask again as soon as they have an answer.

    python -m benchmarks.serve_workers BUNDLE CHECK_IMAGES

The engines take turns, so that other work on the machine slows all of them; figures are medians of the rounds
with the smallest and the largest, ratios are of the same round. No engine keeps features or prefixes, as if
every picture were a new one, and threads are as many as the server would choose. Processor time is that of
the server and its workers. At last, what it costs to pass a picture of 1024 pixels to another process.
"""

import argparse
import asyncio
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from fastvlm_convert.prompt import Prompt, user_message
from fastvlm_convert.prompt_cache import image_key
from fastvlm_convert.serve.engine import Question, Sampling
from fastvlm_convert.serve.engines.choice import threads_of
from fastvlm_convert.serve.engines.embedded import EmbeddedEngine
from fastvlm_convert.serve.engines.frames import read_frame, write_frame
from fastvlm_convert.serve.engines.processes import ProcessesEngine, Workers
from fastvlm_convert.serve.engines.worker_messages import question_frame
from fastvlm_convert.serve.served_bundle import ServedBundle, open_served_bundle
from fastvlm_convert.serve.settings import Settings

USERS = 8
PASSED = 40  # pictures that are passed

ECHO = """
import sys
from fastvlm_convert.serve.engines.frames import Frame, receive_frame, send_frame
import os
frames = os.fdopen(0, "rb", buffering=0)
while receive_frame(frames) is not None:
    send_frame(sys.stdout.buffer, Frame("piece"))
"""


@dataclass
class Figures:
    """What was measured of an engine, a value a round."""

    answers_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)


def engines(bundle: ServedBundle) -> dict[str, EmbeddedEngine | ProcessesEngine]:
    """What is compared, the first is what the others are compared with."""

    def workers(count: int) -> ProcessesEngine:
        each = threads_of(bundle, Settings(engine="processes", max_workers=count), count)
        return ProcessesEngine(
            bundle, Workers(count, count, threads=each, feature_cache_bytes=0, prefix_cache_bytes=0)
        )

    def slots(count: int) -> EmbeddedEngine:
        return EmbeddedEngine(bundle, count, threads_of(bundle, Settings(slots=count), count))

    return {
        "embedded, 2 slots": slots(2),
        "embedded, 1 slot": slots(1),
        "processes, 1 worker": workers(1),
        "processes, 2 workers": workers(2),
    }


def questions(bundle: ServedBundle, folder: Path) -> list[Question]:
    """The demo's questions, without a deadline."""
    found = []
    for entry in json.loads((folder / "questions.json").read_text()):
        with Image.open(folder / entry["image"]) as image:
            prompt = bundle.prompt([user_message(entry["question"], [image.convert("RGB")])])
        keys = tuple(map(image_key, prompt.images))
        found.append(Question("bench", prompt, keys, Sampling(64), math.inf, threading.Event()))
    return found


def processor_time_s() -> float:
    """Of this process and its children."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children()):
        times = process.cpu_times()
        total += times.user + times.system
    return total


async def load(
    engine: EmbeddedEngine | ProcessesEngine, asked: list[Question], seconds: float
) -> list[float]:
    """Seconds of each answer, of users who go on for a while."""
    slots = asyncio.Semaphore(engine.status().slots)
    end = time.monotonic() + seconds
    took = []

    async def user(number: int) -> None:
        while (began := time.monotonic()) < end:
            number += USERS
            async with slots, aclosing(engine.answer(asked[number % len(asked)])) as items:
                async for _ in items:
                    pass
            took.append(time.monotonic() - began)

    await asyncio.gather(*map(user, range(USERS)))
    return took


async def compare(bundle: ServedBundle, asked: list[Question], rounds: int, seconds: float) -> None:
    """Print what was measured of each engine."""
    compared = engines(bundle)
    for engine in compared.values():
        await engine.start()
        await load(engine, asked, 0.5)
    figures = {name: Figures() for name in compared}
    for _ in range(rounds):
        for name, engine in compared.items():
            cpu_s, began = processor_time_s(), time.monotonic()
            took = await load(engine, asked, seconds)
            passed = time.monotonic() - began
            figures[name].answers_per_s.append(len(took) / passed)
            figures[name].cpu_ms.append(1000 * (processor_time_s() - cpu_s) / len(took))
            figures[name].p50_ms.append(1000 * statistics.median(took))
    for engine in compared.values():
        await engine.stop()
    first = next(iter(figures.values()))
    print(f"{USERS} users, {rounds} rounds of {seconds:g} s, bundle {bundle.name}")
    for name, of in figures.items():
        ratios = [a / b for a, b in zip(of.answers_per_s, first.answers_per_s, strict=True)]
        print(
            f"{name:22} {spread(of.answers_per_s)} answers/s  {spread(of.cpu_ms)} CPU ms an answer  "
            f"{spread(of.p50_ms)} ms p50  {spread(ratios, 2)} x"
        )


def spread(values: list[float], digits: int = 1) -> str:
    """Median, smallest and largest."""
    shown: Callable[[float], str] = lambda x: f"{x:.{digits}f}"  # noqa: E731
    return f"{shown(statistics.median(values))} ({shown(min(values))}..{shown(max(values))})"


async def pass_pictures() -> None:
    """Print what it costs to pass pictures to a process that only receives them."""
    pixels = np.random.default_rng(0).random((1, 3, 1024, 1024), np.float32)
    prompt = Prompt((np.arange(20), np.arange(20)), (pixels,))
    frame = question_frame(Question("x", prompt, ("k",), Sampling(64), 0.0))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", ECHO, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    took: list[float] = []
    for number in range(PASSED + 1):
        began = time.perf_counter()
        await write_frame(process.stdin, frame)
        await read_frame(process.stdout)
        if number:
            took.append(1000 * (time.perf_counter() - began))
        else:
            cpu_s = processor_time_s()
    cpu_ms = 1000 * (processor_time_s() - cpu_s) / PASSED
    print(
        f"a picture of 1024 pixels, {pixels.nbytes / 1e6:.1f} MB: {spread(took)} ms until it is there, "
        f"{cpu_ms:.1f} CPU ms of both"
    )
    process.stdin.close()
    await process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("check_images", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    arguments = parser.parse_args()
    bundle = open_served_bundle(arguments.bundle)
    asked = questions(bundle, arguments.check_images)
    asyncio.run(compare(bundle, asked, arguments.rounds, arguments.seconds))
    asyncio.run(pass_pictures())


if __name__ == "__main__":
    main()
