"""Record loads of a worker that runs a bundle, for the tests of scaling.

    python -m benchmarks.serve_traces BUNDLE CHECK_IMAGES FOLDER

One worker with one thread answers questions about the demo's pictures, which arrive at random (Poisson),
at a rate that follows each pattern; it is measured every two seconds for forty. Rates are multiples of what
the worker answers when it is always busy, which is measured first. It keeps no features and no prefixes.
"""

import argparse
import asyncio
import json
import math
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path

from benchmarks.serve_workers import questions
from fastvlm_convert.serve.admission import Admission
from fastvlm_convert.serve.autoscaler import Autoscaler, Scaling
from fastvlm_convert.serve.engine import Question
from fastvlm_convert.serve.engines.processes import ProcessesEngine, Workers
from fastvlm_convert.serve.errors import RequestError
from fastvlm_convert.serve.scaling import Limits
from fastvlm_convert.serve.served_bundle import open_served_bundle
from fastvlm_convert.serve.traffic import Traffic

SECONDS, INTERVAL_S = 40.0, 2.0
PATTERNS: dict[str, tuple[str, Callable[[float], float]]] = {
    "idle": ("no questions", lambda t: 0.0),
    "steady": ("0.3 of the worker's rate", lambda t: 0.3),
    "burst": ("0.1, and 3 from the 10th to the 18th second", lambda t: 3.0 if 10 <= t < 18 else 0.1),
    "ramp": ("from 0.1 to 2 in 40 s", lambda t: 0.1 + 1.9 * t / SECONDS),
    "sawtooth": ("from 0 to 2 in 10 s, four times", lambda t: 2 * math.fmod(t, 10) / 10),
}


class Load:
    """Questions on their way to one engine, through a queue as the server's."""

    def __init__(self, engine: ProcessesEngine, asked: list[Question]) -> None:
        self.traffic = Traffic()
        self.admission = Admission(64, lambda: engine.status().slots)
        self._engine = engine
        self._asked = asked

    async def ask(self, number: int) -> None:
        """One question, from its arrival on; nothing where the queue is full."""
        self.traffic.came()
        try:
            async with self.admission.slot(math.inf) as waited_s:
                began = time.monotonic()
                async with aclosing(self._engine.answer(self._asked[number % len(self._asked)])) as items:
                    async for _ in items:
                        pass
                self.traffic.answered(waited_s, time.monotonic() - began)
        except RequestError as error:
            if error.code != "queue_full":
                raise


async def record(load: Load, scaler: Autoscaler, rate: Callable[[float], float], busy: float) -> None:
    """Let questions arrive, and measure."""
    rng = random.Random(13)
    began, tasks, number = time.monotonic(), set(), 0
    next_look = INTERVAL_S
    while (t := time.monotonic() - began) < SECONDS:
        await asyncio.sleep(0.01)
        passed = time.monotonic() - began - t
        if rng.random() < rate(t) * busy * passed:
            number += 1
            tasks.add(asyncio.create_task(load.ask(number)))
        if t >= next_look:
            next_look += INTERVAL_S
            await scaler.step()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def busy_rate(load: Load) -> float:
    """Answers in a second of a worker that is always busy."""
    await load.ask(0)
    began = time.monotonic()
    for number in range(40):
        await load.ask(number)
    load.traffic.take()
    return 40 / (time.monotonic() - began)


async def main() -> None:
    """Write a file for each pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("check_images", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    bundle = open_served_bundle(arguments.bundle)
    engine = ProcessesEngine(bundle, Workers(threads=1, feature_cache_bytes=0, prefix_cache_bytes=0))
    await engine.start()
    asked = questions(bundle, arguments.check_images)
    busy = await busy_rate(Load(engine, asked))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, (what, rate) in PATTERNS.items():
        load = Load(engine, asked)
        scaling = Scaling("adaptive", Limits(1, 1))
        admission = load.admission
        scaler = Autoscaler(engine, load.traffic, lambda a=admission: a.waiting, scaling, lambda *_: None)
        await record(load, scaler, rate, busy)
        measured = [_rounded(asdict(m), scaler.window[0].at_s) for m in scaler.window]
        made = f"Recorded by benchmarks/serve_traces.py: {what}; the busy worker answers {busy:.1f} a second."
        lines = ",\n".join(f"    {json.dumps(m)}" for m in measured)
        text = f'{{\n  "made": {json.dumps(made)},\n  "measurements": [\n{lines}\n  ]\n}}\n'
        (arguments.folder / f"{name}.json").write_text(text)
        print(name, made)
    await engine.stop()


def _rounded(measurement: dict[str, float | None], began_s: float) -> dict[str, float | None]:
    values = {k: None if v is None else round(v, 4) for k, v in measurement.items()}
    return values | {"at_s": round((measurement["at_s"] or 0) - began_s, 2)}


if __name__ == "__main__":
    asyncio.run(main())
