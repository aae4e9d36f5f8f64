"""Commands that alternate between runtimes let idle threads sleep."""

import os
import subprocess
import sys

import pytest

COMMANDS = (["verify", "nothing", "--reference", "nothing"], ["evaluate", "nothing", "--dataset", "demo"])
SCRIPT = """
import os, sys
from fastvlm_convert.cli.main import main
main(sys.argv[1:])
print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


def policy(arguments: list[str], **given: str) -> str:
    """The policy that a command leaves behind, and whether PyTorch has loaded before it could read that."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_idle_threads_sleep(arguments):
    assert policy(arguments) == "passive False"


def test_what_the_user_says_stays():
    assert policy(COMMANDS[0], OMP_WAIT_POLICY="active") == "active False"
