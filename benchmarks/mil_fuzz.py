"""Damage small Core ML packages at random; load, survey and run each. Only errors meant for users may result.

Half of the attempts change bytes of the files, the other half the program: types, shapes, wires, numbers.

    python -m benchmarks.mil_fuzz [--attempts 100000] [--state fuzz.json]

Run it from the repository's root. It resumes where the state file ends. The work is done in child processes
with limited memory, so that a crash, a hang or a huge allocation is a finding, too. Reproduce a finding with
`python -m benchmarks.mil_fuzz --repeat SEED WAY NUMBER`.
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

from tests.mil.mutations import Seed, attempt
from tests.mil.rewrites import WAYS

CHUNK = 2000
MEMORY = 6 << 30  # address space of a child; torch alone maps more than 1 GiB
SECONDS = 120  # of one attempt; a loop that does not end takes 20,000 iterations
SHOWN = 20


class HangError(Exception):
    """An attempt took too long."""


def hang(signum: int, frame: FrameType | None) -> NoReturn:
    """The alarm of one attempt."""
    raise HangError


def work(seed_path: Path, way: str, first: int, count: int) -> None:
    """Make attempts, and print one line for each: the outcome, or what went wrong."""
    import torch  # before the limit is set

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, hang)
    seed = Seed.read(seed_path)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / seed_path.name
        for number in range(first, first + count):
            changed = WAYS[way](seed, number)
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


def chunk(seed_path: Path, way: str, first: int, count: int) -> list[str]:
    """The outcomes that a child printed; if it died, the last one is a finding."""
    job = [str(seed_path), way, str(first), str(count)]
    command = [sys.executable, "-m", "benchmarks.mil_fuzz", "--work", *job]
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
        jobs = {f"{seed.stem} {way}": (seed, way) for seed in seeds for way in WAYS}
        each = -(-attempts // len(jobs))
        while any(state["next"].get(job, 0) < each for job in jobs):
            for job, (seed, way) in jobs.items():
                first = state["next"].get(job, 0)
                if first >= each:
                    continue
                outcomes = chunk(seed, way, first, min(CHUNK, each - first))
                state["next"][job] = first + len(outcomes)
                found = [f"{job} {first + i}: {o}" for i, o in enumerate(outcomes) if o.startswith("FINDING")]
                state["findings"] += found
                kinds = Counter("FINDING" if o.startswith("FINDING") else o for o in outcomes)
                state["outcomes"] = dict(Counter(state["outcomes"]) + kinds)
                state_path.write_text(json.dumps(state, indent=1))
                print(f"{sum(state['next'].values())} attempts: {state['outcomes']}", flush=True)
    return state


def repeat(seed_name: str, way: str, number: int) -> None:
    """Make one attempt in this process, without any protection."""
    from tests.mil.seeds import write_seeds

    with tempfile.TemporaryDirectory() as folder:
        (path,) = (s for s in write_seeds(Path(folder)) if s.stem == seed_name)
        seed = Seed.read(path)
        seed.write(path, WAYS[way](seed, number))
        print(attempt(path))


def main() -> None:
    """Fuzz and print counts and findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempts", type=int, default=100_000)
    parser.add_argument("--state", type=Path, default=Path("fuzz.json"))
    parser.add_argument("--repeat", nargs=3, metavar=("SEED", "WAY", "NUMBER"))
    parser.add_argument("--work", nargs=4, metavar=("SEED", "WAY", "FIRST", "COUNT"))
    arguments = parser.parse_args()
    if arguments.work:
        seed, way, first, count = arguments.work
        work(Path(seed), way, int(first), int(count))
    elif arguments.repeat:
        seed, way, number = arguments.repeat
        repeat(seed, way, int(number))
    else:
        state = fuzz(arguments.attempts, arguments.state)
        findings = state["findings"]
        assert isinstance(findings, list)
        print(f"findings: {len(findings)}")
        for finding in findings[:SHOWN]:
            print(finding)


if __name__ == "__main__":
    main()
