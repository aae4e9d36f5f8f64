"""What happens to standard output and error, in processes of their own."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.cli.conftest import CHECKPOINT

# One process for all: starting one takes half a second.
ATTEMPTS = r"""
import os, subprocess, sys
from fastvlm_convert.cli.main import main

checkpoint, flags = sys.argv[1], sys.argv[2:]
for out, err, what in [
    ("closed", "null", checkpoint), ("full", "null", checkpoint), ("null", "full", checkpoint),
    ("null", "closed", checkpoint), ("closed", "closed", checkpoint), ("full", "full", checkpoint),
    ("full", "null", "/nowhere"), ("closed", "full", "/nowhere"), ("null", "full", "/nowhere"),
]:
    child = os.fork()
    if child == 0:
        for number, kind in ((1, out), (2, err)):
            os.dup2(os.open("/dev/" + kind.replace("closed", "null"), os.O_WRONLY), number)
        for number, kind in ((1, out), (2, err)):
            if kind == "closed":
                os.close(number)
                setattr(sys, ("", "stdout", "stderr")[number], None)
        sys.exit(main(["inspect", what, *flags]))
    _, status = os.waitpid(child, 0)
    print(out, err, what == checkpoint, os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_no_stream_ever_gives_exit_code_1(flags):
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, CHECKPOINT, *flags], capture_output=True, text=True, check=True
    )
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["closed", "null", "True", "2"],
        ["full", "null", "True", "2"],
        ["null", "full", "True", "0"],  # the result was told
        ["null", "closed", "True", "0"],
        ["closed", "closed", "True", "2"],
        ["full", "full", "True", "2"],
        ["full", "null", "False", "2"],
        ["closed", "full", "False", "2"],
        ["null", "full", "False", "2"],
    ]


def command(redirect, *flags):
    line = f'"$0" -m fastvlm_convert inspect "$1" {" ".join(flags)} {redirect}'
    return subprocess.run(["sh", "-c", line, sys.executable, CHECKPOINT], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("redirect", "reason"), [(">&-", "it is closed"), (">/dev/full", "No space left on device")]
)
def test_a_result_that_cannot_be_told_is_one_line(redirect, reason):
    done = command(redirect)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot write to standard output: {reason}\nhint: redirect it to where there is room\n"
    )


def test_an_unreadable_error_stream_does_not_spoil_the_result():
    done = command("2>/dev/full", "--json")
    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "passed")


# A command that waits for a signal in the middle of its work.
WAITING = """
import sys, time
from fastvlm_convert.cli import inspect
from fastvlm_convert.cli.main import main

def wait(*_, **__):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

inspect.open_checkpoint = wait
sys.exit(main(["inspect", "x", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(number):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, "cleaned up\n", "")


def test_a_signal_is_an_error_in_json():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert json.loads(out.removeprefix("cleaned up\n"))["error"]["code"] == "interrupted"


def test_nohup_is_followed():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.communicate()
