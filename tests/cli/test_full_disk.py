"""A disk that fills up, wherever that happens: one line, exit code 2, nothing left behind."""

import os
import subprocess
import sys

import pytest

from tests.bundles import mixed_recipe, write_recipe
from tests.cli.conftest import CHECKPOINT, IMAGE

pytestmark = pytest.mark.slow

# Runs a command in a fork for each limit of a file's size, as if the disk had no room for more.
LIMITED = """
import os, resource, shutil, sys
from pathlib import Path
import torch
import fastvlm_convert.exporters.coreml.write, fastvlm_convert.exporters.onnx.write
from fastvlm_convert.cli.main import main

folder = Path(sys.argv[1])
for limit in map(int, sys.argv[2].split(",")):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        code = main(sys.argv[3:])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as told:
        text = told.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = sorted(p.name for p in folder.iterdir())
    shutil.rmtree(folder)
    folder.mkdir()
    print(repr((limit, code, text, left)), flush=True)
"""


def attempts(folder, limits, *argv):
    """(limit, exit code, what was printed, what is left) of every limit."""
    folder.mkdir()
    environment = {**os.environ, "FASTVLM_CONVERT_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, folder, ",".join(map(str, limits)), *map(str, argv)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = [eval(line) for line in done.stdout.splitlines()]
    assert [limit for limit, *_ in found] == limits
    return found


def check(found, allowed=()):
    """All but the last attempt failed as they should; how many did."""
    failed = 0
    for limit, code, text, left in found:
        if code == 0:
            continue
        failed += 1
        assert code == 2, (limit, text)
        lines = [line for line in text.splitlines() if not line.startswith(("interrupted", "warning"))]
        assert [line.partition(" ")[0] for line in lines] == ["error:", "hint:"], (limit, text)
        assert "File too large" in lines[0] or "cannot write the weights" in lines[0], (limit, text)
        assert set(left) <= {"cache", *allowed}, (limit, left)
    return failed


LIMITS = [0, 1000, 6000, 30_000, 120_000, 300_000]


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_export(tmp_path, target):
    folder = tmp_path / "disk"
    argv = ("export", CHECKPOINT, "--target", target, "--recipe", "fp16", "-o", folder / "bundle")
    assert check(attempts(folder, LIMITS, *argv)) >= 4


def test_quantize(tmp_path):
    folder = tmp_path / "disk"
    recipe = write_recipe(mixed_recipe(), tmp_path / "mixed.yaml")
    found = attempts(folder, LIMITS, "quantize", CHECKPOINT, "--recipe", recipe, "-o", folder / "out")
    assert check(found, allowed=["out.partial"]) >= 3


def test_scan_prints_and_writes_what_it_can(tmp_path):
    """Its cache does not fit; the recipe, and what it prints, do."""
    folder = tmp_path / "disk"
    argv = ("scan", CHECKPOINT, "--images", IMAGE.parent, "--max-new-tokens", 1, "-o", folder / "mine.yaml")
    ((_, code, text, left),) = attempts(folder, [5000], *argv)
    assert code == 0
    assert "warning: the result cannot be kept for `export` (File too large" in text
    assert "operations have at least" in text
    assert "mine.yaml" in left


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_small_disk(tmp_path, cli):
    """The same on a real file system of half a megabyte."""
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("this container may not mount")
    try:
        arguments = ("--target", "onnx", "--recipe", "fp32", "-o", disk / "out", "--json")
        result = cli("export", CHECKPOINT, *arguments)
        assert result.code == 2
        assert "No space left on device" in result.document["error"]["message"]
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
