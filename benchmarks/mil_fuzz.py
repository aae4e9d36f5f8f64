"""Damage small Core ML packages at random; load, survey and run each. Only errors meant for users may result.

    python -m benchmarks.mil_fuzz [--attempts 100000] [--state fuzz.json]

Run it from the repository's root. It resumes where the state file ends. The work is done in child processes
with limited memory, so that a crash, a hang or a huge allocation is a finding, too. Reproduce a finding with
`python -m benchmarks.mil_fuzz --repeat SEED NUMBER`.
"""

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.mil.mutations import Seed, attempt, damage

CHUNK = 2000
MEMORY = 6 << 30  # address space of a child; torch alone maps more than 1 GiB
SECONDS = 20  # of one attempt
SHOWN = 20


class HangError(Exception):
    """An attempt took too long."""


def hang(signum: int, frame: FrameType | None) -> NoReturn:
    """The alarm of one attempt."""
    raise HangError


def work(seed_path: Path, first: int, count: int) -> None:
    """Make attempts, and print one line for each: the outcome, or what went wrong."""
    import torch  # before the limit is set

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, hang)
    seed = Seed.read(seed_path)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / seed_path.name
        for number in range(first, first + count):
            changed = damage(seed, number)
            seed.write(package, changed)
            signal.alarm(SECONDS)
            try:
                outcome = attempt(package)
            except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
                where = traceback.extract_tb(error.__traceback__)[-1]
                outcome = (
                    f"FINDING {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
                )
            signal.alarm(0)
            print(" ".join(outcome.split())[:200], flush=True)
            seed.write(package, {path: seed.files[path] for path in changed})


def chunk(seed_path: Path, first: int, count: int) -> list[str]:
    """The outcomes that a child printed; if it died, the last one is a finding."""
    command = [sys.executable, "-m", "benchmarks.mil_fuzz", "--work", str(seed_path), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    outcomes = done.stdout.splitlines()
    if len(outcomes) < count:
        outcomes.append(f"FINDING the process died with {done.returncode}: {done.stderr[-150:]!r}")
    return outcomes


def fuzz(attempts: int, state_path: Path) -> dict[str, object]:
    """Make all attempts, alternating between the seeds; save the state after each chunk."""
    from tests.mil.seeds import write_seeds  # imports coremltools

    state = {"next": {}, "outcomes": {}, "findings": []}
    if state_path.exists():
        state = json.loads(state_path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        seeds = write_seeds(Path(folder))
        each = -(-attempts // len(seeds))
        while any(state["next"].get(s.stem, 0) < each for s in seeds):
            for seed in seeds:
                first = state["next"].get(seed.stem, 0)
                if first >= each:
                    continue
                outcomes = chunk(seed, first, min(CHUNK, each - first))
                state["next"][seed.stem] = first + len(outcomes)
                found = [
                    f"{seed.stem} {first + i}: {o}" for i, o in enumerate(outcomes) if o.startswith("FINDING")
                ]
                state["findings"] += found
                kinds = Counter("FINDING" if o.startswith("FINDING") else o for o in outcomes)
                state["outcomes"] = dict(Counter(state["outcomes"]) + kinds)
                state_path.write_text(json.dumps(state, indent=1))
                print(f"{sum(state['next'].values())} attempts: {state['outcomes']}", flush=True)
    return state


def repeat(seed_name: str, number: int) -> None:
    """Make one attempt in this process, without any protection."""
    from tests.mil.seeds import write_seeds

    with tempfile.TemporaryDirectory() as folder:
        (path,) = (s for s in write_seeds(Path(folder)) if s.stem == seed_name)
        seed = Seed.read(path)
        seed.write(path, damage(seed, number))
        print(attempt(path))


def main() -> None:
    """Fuzz and print counts and findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempts", type=int, default=100_000)
    parser.add_argument("--state", type=Path, default=Path("fuzz.json"))
    parser.add_argument("--repeat", nargs=2, metavar=("SEED", "NUMBER"))
    parser.add_argument("--work", nargs=3, metavar=("SEED", "FIRST", "COUNT"))
    arguments = parser.parse_args()
    if arguments.work:
        work(Path(arguments.work[0]), int(arguments.work[1]), int(arguments.work[2]))
    elif arguments.repeat:
        repeat(arguments.repeat[0], int(arguments.repeat[1]))
    else:
        state = fuzz(arguments.attempts, arguments.state)
        findings = state["findings"]
        assert isinstance(findings, list)
        print(f"findings: {len(findings)}")
        for finding in findings[:SHOWN]:
            print(finding)


if __name__ == "__main__":
    main()
