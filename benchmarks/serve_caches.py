"""What do the caches of `serve` cost? Microseconds for each lookup and for each value kept.

    python -m benchmarks.serve_caches [--rounds 2000]

One row for each kind of access: answers in memory, in the file (with the way to its thread and back, as
requests see it), and image features and KV prefixes of the 0.5B model's size. Peer: computing an answer
again, 22 ms of vision and 5 ms of prefill on the demo bundle. Limit: a hundredth of that, 270 us a lookup.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastvlm_convert.serve.caches import AnswerCache, cache_key, open_answer_cache
from fastvlm_convert.serve.disk_cache import DiskCache
from fastvlm_convert.serve.engine import Reply, StageTimings
from fastvlm_convert.serve.prompt_caches import PromptCaches
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.session import KvPrefix

KEYS = [cache_key(str(number)) for number in range(90)]  # as many as the cache in memory holds
REPLY = Reply("A red square beside two blue circles. " * 8, "stop", 80, 48, 60, StageTimings(), "miss")
FEATURES = np.zeros((256, 896), np.float32)  # 0.9 MB: a picture of 1024 pixels
PREFIX = KvPrefix(0, 270, tuple(np.zeros((2, 270, 64), np.float16) for _ in range(48)))

Row = tuple[str, float]


def each_us(action: Callable[[str], object], rounds: int) -> float:
    """Median of the times of single calls, in microseconds."""
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        action(KEYS[number % len(KEYS)])
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


async def answers(folder: Path, rounds: int) -> list[Row]:
    """Answers in memory and in the file."""
    cache = open_answer_cache(Settings(cache_dir=folder))
    assert cache is not None
    for key in KEYS:
        await cache.put(key, REPLY)
        await asyncio.sleep(0.002)  # the file is written in the background
    rows = [("answer, in memory: hit", await waited_us(cache, KEYS, rounds))]
    await cache.close()
    times = []
    for _ in range(max(1, rounds // len(KEYS))):
        fresh = open_answer_cache(Settings(cache_dir=folder))
        assert fresh is not None
        await fresh.get("opens the file")
        times.append(await waited_us(fresh, KEYS, len(KEYS)))
        await fresh.close()
    rows.append(("answer, in the file: hit", statistics.median(times)))
    fresh = open_answer_cache(Settings(cache_dir=folder))
    assert fresh is not None
    unknown = [f"unknown {number}" for number in range(len(KEYS))]
    rows.append(("answer, not there: miss", await waited_us(fresh, unknown, rounds)))
    await fresh.close()
    return rows


async def waited_us(cache: AnswerCache, keys: list[str], rounds: int) -> float:
    """Median of what a request waits for a lookup, in microseconds."""
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        await cache.get(keys[number % len(keys)])
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def file_alone(folder: Path, rounds: int) -> Iterator[Row]:
    """The file, without threads."""
    disk = DiskCache(folder, 3600)
    value = {"text": REPLY.text, "tokens": 60}
    yield "file alone: put", each_us(lambda key: disk.put(key, value), rounds)
    yield "file alone: get", each_us(disk.get, rounds)
    disk.close()


def prompts(rounds: int) -> Iterator[Row]:
    """Features and prefixes."""
    cache = PromptCaches(100 * FEATURES.nbytes, 100 * PREFIX.num_bytes).of_model("a bundle")
    yield "image features: put", each_us(lambda key: cache.put_features(key, FEATURES), rounds)
    yield "image features: hit", each_us(cache.get_features, rounds)
    yield "KV prefix: put", each_us(lambda key: cache.put_prefix(key, PREFIX), rounds)
    yield "KV prefix: hit", each_us(cache.get_prefix, rounds)


def main() -> None:
    """Print one row for each kind of access."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(answers(Path(folder) / "answers", rounds))
        rows += file_alone(Path(folder) / "alone", rounds)
    rows += prompts(rounds)
    for name, microseconds in rows:
        print(f"{name:<28}{microseconds:8.1f} us")


if __name__ == "__main__":
    main()
