"""CPU seconds of one question, by what is known of it: nothing, the picture's features, its keys and values.

    python -m benchmarks.serve_costs [BUNDLE] [--rounds 5] [--threads 1] [--answer-tokens 32]

Without a bundle, one of the true dimensions of FastVLM-0.5B is made of random weights (int4, some minutes,
2 GB of disk). Peer: the bundle's graphs called directly, without the decode loop and its caches, in the same
round. Limits: a feature hit costs at most prefill + decode + 5 %, a prefix hit at most new tokens + decode +
10 %, in the median of the rounds; hits choose from the logits of a miss, bit for bit. Exits with 1 if one
does not hold. How far the logits are from those of a prompt that is read at once is printed, too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from benchmarks.random_checkpoint import write_checkpoint
from fastvlm_convert.amounts import count_text
from fastvlm_convert.bench.machine import this_machine
from fastvlm_convert.generate import Answer, answer_tokens, greedy, stream_tokens
from fastvlm_convert.pipeline import export
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.prompt_cache import MemoryPromptCache
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.recipe import load_recipe, without_data
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle
from fastvlm_convert.runtime.onnx_session import OnnxSequence

QUESTION: Final = "What is on the table, and which color is it?"
EARLIER: Final = "Describe the image."
LIMITS: Final = {"feature hit": ("prefill + decode", 1.05), "prefix hit": ("new tokens + decode", 1.10)}

Rows = list[np.ndarray]


class Costs:
    """One question in all ways; each returns the logits that its tokens were chosen from.

    Args:
        model: The bundle, whose cache is not used.
        new_tokens: Tokens of every answer, whatever they are.
    """

    def __init__(self, model: LoadedModel, new_tokens: int) -> None:
        assert isinstance(model.session, OnnxSequence), "only ONNX bundles can begin in the middle"
        picture = Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), 20).convert("RGB")
        self.session = model.session
        self.new_tokens = new_tokens
        self.prompt = model.prompt(QUESTION, [picture])
        self.features = self.session.encode_image(self.prompt.images[0])
        full = MemoryPromptCache()
        self._answer(model.prompt(EARLIER, [picture]), full)
        self.known = full
        self.place = len(self.prompt.segments[0]) + self.session.num_image_tokens
        self.embeds = embed_prompt(self.session, self.prompt, [self.features])
        self.session.prefill(self.embeds[: self.place])
        self.prefix = self.session.copy_prefix(self.place)
        self.hits: dict[str, tuple[int, int]] = {}

    def ways(self) -> dict[str, Callable[[], Rows]]:
        """What is measured, by name."""
        return {
            "vision": self.vision,
            "miss": lambda: self.ask("miss", MemoryPromptCache()),
            "feature hit": lambda: self.ask("feature hit", FeaturesOnly(self.known)),
            "prefill + decode": self.prefill_and_decode,
            "prefix hit": lambda: self.ask("prefix hit", PrefixesOnly(self.known)),
            "new tokens + decode": self.new_tokens_and_decode,
        }

    def ask(self, name: str, cache: MemoryPromptCache) -> Rows:
        """The decode loop of `run`, `chat` and `serve`."""
        answer, rows = self._answer(self.prompt, cache)
        self.hits[name] = (answer.encoded_images, answer.cached_tokens)
        return rows

    def vision(self) -> Rows:
        """The encoder alone."""
        self.session.encode_image(self.prompt.images[0])
        return []

    def prefill_and_decode(self) -> Rows:
        """The graphs alone, where the image's features are at hand."""
        embeds = embed_prompt(self.session, self.prompt, [self.features])
        return self._decode(self.session.prefill(embeds))

    def new_tokens_and_decode(self) -> Rows:
        """The graphs alone, in a sequence that has come to the end of the picture."""
        embeds = self.session.embed(self.prompt.segments[1])
        return self._decode(self.session.append(embeds))

    def before(self, name: str) -> None:
        """What is at hand before a way is measured."""
        if name == "new tokens + decode":
            self.session.start_from([self.prefix])

    def _decode(self, logits: np.ndarray) -> Rows:
        rows: Rows = []
        for _ in stream_tokens(self.session, logits, self.new_tokens, _noting(rows)):
            pass
        return rows

    def _answer(self, prompt: Prompt, cache: MemoryPromptCache) -> tuple[Answer, Rows]:
        rows: Rows = []
        tokens = answer_tokens(self.session, prompt, (), self.new_tokens, _noting(rows), cache=cache)
        while True:
            try:
                next(tokens)
            except StopIteration as end:
                return end.value, rows


class FeaturesOnly(MemoryPromptCache):
    """A cache that knows the features that another one does."""

    def __init__(self, other: MemoryPromptCache) -> None:
        super().__init__()
        self.get_features = other.get_features  # type: ignore[method-assign]


class PrefixesOnly(MemoryPromptCache):
    """A cache that knows the prefixes that another one does."""

    def __init__(self, other: MemoryPromptCache) -> None:
        super().__init__()
        self.get_prefix = other.get_prefix  # type: ignore[method-assign]


def _noting(rows: Rows) -> Callable[[np.ndarray], int]:
    def choose(logits: np.ndarray) -> int:
        rows.append(logits)
        return greedy(logits)

    return choose


def measure(costs: Costs, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of each way in each round, all threads together; and how far its logits are from a miss."""
    seconds: dict[str, list[float]] = {}
    distances: dict[str, float] = {}
    for number in range(rounds + 1):
        expected: Rows = []
        for name, way in costs.ways().items():
            costs.before(name)
            start = time.process_time()
            rows = way()
            if number:  # the first round warms up
                seconds.setdefault(name, []).append(time.process_time() - start)
            expected = expected or rows
            if rows:
                most = float(np.abs(np.stack(rows) - np.stack(expected)).max())
                distances[name] = max(most, distances.get(name, 0.0))
    return seconds, distances


def show(seconds: dict[str, list[float]]) -> bool:
    """Print the table and the verdicts; whether all limits hold."""
    print("| CPU seconds of a question | median | least | most | vision saved |")
    print("|---|---|---|---|---|")
    vision = statistics.median(seconds["vision"])
    for name, values in seconds.items():
        saved = f"{vision:.3f}" if name in LIMITS else ""
        print(
            f"| {name} | {statistics.median(values):.4f} | {min(values):.4f} | {max(values):.4f} | {saved} |"
        )
    holds = True
    for name, (peer, limit) in LIMITS.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[peer], strict=True)]
        ratio = statistics.median(ratios)
        holds = holds and ratio <= limit
        verdict = "passed" if ratio <= limit else "FAILED"
        print(
            f"{verdict}: {name} / ({peer}) = {ratio:.3f}, {min(ratios):.3f} to {max(ratios):.3f} by round; "
            f"limit {limit:.2f}"
        )
    miss = statistics.median(seconds["miss"])
    for name in LIMITS:
        print(f"miss / {name} = {miss / statistics.median(seconds[name]):.1f}")
    return holds


def main() -> int:
    """Print what the machine is, the table and the verdicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--answer-tokens", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle
        if bundle is None:
            bundle, checkpoint = Path(folder) / "bundle", Path(folder) / "checkpoint"
            write_checkpoint(checkpoint, "0.5b")
            export(checkpoint, bundle, recipe=without_data(load_recipe("int4")), targets="onnx")
        # Threads that wait in a busy loop would count as work.
        model = load_bundle(bundle, "onnx", threads=arguments.threads, spinning=False)
        costs = Costs(model, arguments.answer_tokens)
        print(
            f"{this_machine().title}; {count_text(arguments.threads, 'thread')}, {costs.session.executed_by}"
        )
        length = costs.prompt.length(costs.session.num_image_tokens)
        print(f"prompt of {length} tokens, {costs.place} of them to the end of the picture")
        seconds, distances = measure(costs, arguments.rounds)
    print("images encoded and tokens known:", costs.hits)
    holds = show(seconds)
    print(f"a prompt read at once: logits differ by up to {distances['prefill + decode']:.3g}")
    equal = all(distances[name] == 0 for name in LIMITS)
    print(f"{'passed' if equal else 'FAILED'}: hits have the logits of a miss, bit for bit")
    return 0 if holds and equal else 1


if __name__ == "__main__":
    sys.exit(main())
