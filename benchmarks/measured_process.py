"""A command in a process of its own, with the processor time and the memory that it took."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.bench.machine import this_machine

# A process begins with the peak of whoever started it (Linux counts from before `exec`), so a small one does.
_LAUNCH: Final = """
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(child.pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump([status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss], file)
"""


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        cpu_s: Seconds of processor time, its children's included; other load on the machine changes little.
        wall_s: Seconds that passed.
        peak_bytes: The most memory that it, or a child of it, had resident.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: int


def run_measured(command: Sequence[object], allowed: Sequence[int] = (0,)) -> tuple[Cost, str]:
    """Run a command.

    Args:
        command: The program and its arguments.
        allowed: Exit codes that are no failure.

    Returns:
        What it took, and what it printed.

    Raises:
        SystemExit: It fails; says the end of what it said.
    """
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        tempfile.NamedTemporaryFile("r") as usage,
    ):
        before = os.times().elapsed
        launch = [sys.executable, "-S", "-c", _LAUNCH, usage.name, *map(str, command)]
        subprocess.run(launch, stdout=out, stderr=err, check=True)
        wall = os.times().elapsed - before
        status, cpu_s, peak = json.load(usage)
        code = os.waitstatus_to_exitcode(status)
        out.seek(0)
        printed = out.read().decode(errors="replace")
        if code not in allowed:
            err.seek(0)
            said = err.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(map(str, command))}\nended with {code}\n{printed}{said}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(cpu_s, wall, peak * unit), printed


def save_cost(path: Path, cost: Cost) -> None:
    """Keep it beside what was made."""
    path.write_text(json.dumps(asdict(cost)) + "\n")


def load_cost(path: Path) -> Cost:
    """What was kept."""
    return Cost(**json.loads(path.read_text()))


def machine_text() -> str:
    """The machine that figures come from, in one line."""
    machine = this_machine()
    return f"{machine.title}; {' '.join(machine.instructions)}"
