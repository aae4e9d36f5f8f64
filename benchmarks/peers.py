"""Our bundles beside other engines' files of the same weights: speed, memory, divergence, paired by round.

    pip install -c constraints.txt 'fastvlm-convert[peers]'                        (compiles llama.cpp)
    python -m benchmarks.peers CHECKPOINT --threads 2 1 --rounds 12
    python -m benchmarks.peers CHECKPOINT --engine int4-fast --engine 'genai b32' --keep FOLDER

The text decoder alone is compared, from token ids: the encoder has no counterpart in the peers. Each engine
runs in a process of its own that is pinned to as many processors as it has threads; the engines take turns,
and ratios are of the same round. What a converter was asked for stands beside what its file holds. A peer
that is not installed is `not_run`. Divergence needs a checkpoint with a trained language model (`real_model`,
with `--noise`: its weights lie on the grid of one of the peers' formats otherwise).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import Contender, Workshop, contenders, made
from benchmarks.measured_process import Cost, machine_text
from benchmarks.paired import markdown, paired_ratio, spread, turns
from benchmarks.peer_made import Made
from benchmarks.peer_quality import Exam, Quality, examine, hold_exam
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint

PREFILL = 288  # tokens: a picture's 256 and a short question
STEPS = 16  # decoded a round


class Process:
    """An engine in a process of its own (`benchmarks.peer_engines`)."""

    def __init__(self, kind: str, path: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.peer_engines", kind, str(path)]
        # Each as its users have it: nothing of our own environment decides about threads.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
        self._child = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:  # noqa: ANN401  JSON
        """Its answer to one request."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(self._log.read().decode(errors="replace")[-3000:])
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
        self._log.close()


Figures = dict[str, dict[str, np.ndarray]]


def measure(files: dict[Contender, Path], threads: int, rounds: int, prompt: list[int]) -> Figures:
    """Figures of each engine by round, [rounds] each; the round before the first warms up."""
    with ExitStack() as stack:
        running = {c.name: stack.enter_context(Process(c.kind, path, threads)) for c, path in files.items()}
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in running}
        for n in range(-1, rounds):
            for name in turns(list(running), n % len(running)):
                found = running[name].ask(do="time", prompt=prompt, steps=STEPS)
                if n >= 0:
                    seen[name].append(found)
    return {name: _figures(found, len(prompt)) for name, found in seen.items()}


def _figures(found: list[dict[str, float]], tokens: int) -> dict[str, np.ndarray]:
    column = {key: np.array([one[key] for one in found]) for key in found[0]}
    return {
        "decode": STEPS / column["decode_s"],
        "prefill": tokens / column["prefill_s"],
        "decode_cpu": STEPS / column["decode_cpu_s"],
        "prefill_cpu": tokens / column["prefill_cpu_s"],
        "peak": column["peak_memory_bytes"],
    }


def speed_table(figures: Figures) -> str:
    """Tokens a second of each, by the clock and by processor time."""
    rows = [
        [
            name,
            spread(f["decode"]).text(1),
            spread(f["prefill"]).text(0),
            f"{np.median(f['decode_cpu']):.1f}",
            f"{np.median(f['prefill_cpu']):.0f}",
            f"{f['peak'].max() / 2**20:.0f}",
        ]
        for name, f in figures.items()
    ]
    head = ["engine", "decode tok/s", "prefill tok/s", "decode tok per CPU s", "prefill tok per CPU s"]
    return markdown([*head, "peak MiB"], rows)


def ratio_table(figures: Figures, ours: Sequence[str], theirs: Sequence[str], metric: str) -> str:
    """Ours by theirs, paired by round: median and quartiles; above 1 we are faster."""
    rows = [
        [name, *(paired_ratio(figures[name][metric], figures[peer][metric]).text(2) for peer in theirs)]
        for name in ours
    ]
    return markdown(["ours / theirs", *theirs], rows)


def made_table(files: dict[Contender, tuple[Path, Cost, Made]], not_run: dict[Contender, str]) -> str:
    """What was asked for, what was made, and what making it took."""
    rows = [
        [
            c.name,
            c.asked,
            m.text,
            f"{m.num_bytes / 1e6:.0f}",
            f"{cost.cpu_s:.0f}" if cost.cpu_s else "-",
            f"{cost.peak_bytes / 2**30:.2f}" if cost.cpu_s else "-",
        ]
        for c, (_, cost, m) in files.items()
    ]
    rows += [[c.name, c.asked, f"not_run: {reason}", "-", "-", "-"] for c, reason in not_run.items()]
    head = ["engine", "asked for", "made", "decoder and table MB", "CPU s to make", "peak GiB to make"]
    return markdown(head, rows)


def quality_table(found: dict[str, Quality]) -> str:
    """Divergence of each, the least first."""
    rows = [
        [name, f"{q.kl:.4f} [{q.low:.4f}, {q.high:.4f}]", f"{100 * q.top1:.1f} %", str(q.num_tokens)]
        for name, q in sorted(found.items(), key=lambda item: item[1].kl)
    ]
    return markdown(["engine", "mean KL, nats [95 %]", "same likeliest token", "tokens"], rows)


def qualities(checkpoint: Path, files: dict[Contender, Path], threads: int) -> dict[str, Quality] | str:
    """Divergence of each from the float model, or why it would say nothing."""
    with tempfile.TemporaryDirectory() as folder:
        with Process("reference", checkpoint, threads) as reference:
            exam = hold_exam(reference, open_checkpoint(checkpoint), Path(folder))
        if not isinstance(exam, Exam):
            return exam
        found = {}
        for contender, path in files.items():
            with Process(contender.kind, path, threads) as engine:
                found[contender.name] = examine(engine, exam)
        return found


def report(asked: argparse.Namespace, folder: Path) -> None:
    """Make everything, measure it, and print tables as they come."""
    taking_part = contenders(asked.engine)
    not_run = {c: reason for c in taking_part if (reason := c.not_run) is not None}
    workshop = Workshop(asked.checkpoint, folder, asked.calibration)
    files: dict[Contender, tuple[Path, Cost, Made]] = {}
    for contender in taking_part:
        if contender not in not_run:
            path, cost = workshop.make(contender)
            files[contender] = (path, cost, made(contender, path))
    workshop.forget_floats()
    print(f"{machine_text()}\n\n{made_table(files, not_run)}", flush=True)
    paths = {contender: path for contender, (path, _, _) in files.items()}
    ours = [c.name for c in files if c.is_ours]
    theirs = [c.name for c in files if not c.is_ours]
    vocabulary = open_checkpoint(asked.checkpoint).config.decoder.vocab_size
    prompt = np.random.default_rng(0).integers(vocabulary, size=asked.prompt).tolist()
    for threads in asked.threads if asked.rounds else ():
        before = os.getloadavg()[0]
        figures = measure(paths, threads, asked.rounds, prompt)
        load = f"load average {before:.1f} before and {os.getloadavg()[0]:.1f} after"
        head = f"{threads} threads, {asked.prompt} tokens of prompt, {asked.rounds} rounds, {load}"
        print(f"\n{head}\n\n{speed_table(figures)}", flush=True)
        for metric in ("decode", "prefill", "decode_cpu", "prefill_cpu") if ours and theirs else ():
            print(f"\n{metric}\n\n{ratio_table(figures, ours, theirs, metric)}", flush=True)
    found = qualities(asked.checkpoint, paths, max(asked.threads))
    table = f"not_run: {found}" if isinstance(found, str) else quality_table(found)
    print(f"\ndivergence from the float model\n\n{table}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engine", action="append", help="all by default")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=12, help="12 by default; 0 times nothing")
    parser.add_argument("--prompt", type=int, default=PREFILL, help=f"its tokens, {PREFILL} by default")
    parser.add_argument("--calibration", type=Path, help="for our recipes; without it none sees data")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keeps files, and uses those that it has")
    asked = parser.parse_args()
    with ExitStack() as stack:
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        report(asked, folder)


if __name__ == "__main__":
    main()
