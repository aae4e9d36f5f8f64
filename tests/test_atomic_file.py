import subprocess
import sys

import pytest

from fastvlm_convert.atomic_file import put_file, whole_file

HELD = """
import os, sys, time
from pathlib import Path
from fastvlm_convert.atomic_file import whole_file

with whole_file(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def held(path):
    process = subprocess.Popen([sys.executable, "-c", HELD, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_it_appears_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.suffix == ".json"
    assert (path.read_text(), names(tmp_path)) == ("new", ["a.json"])


def fail(path, error):
    with whole_file(path) as partial:
        partial.write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error):
        fail(path, error)
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.json"])


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "a.json"
    precious = tmp_path / ".a.mine.partial.json"
    precious.write_text("mine")
    living = held(path)
    killed = [held(path) for _ in range(3)]  # folders list their files in any order
    for process in killed:
        process.kill()
        process.communicate()
    assert len(names(tmp_path)) == 5
    with whole_file(path) as partial:
        partial.write_text("new")
    assert names(tmp_path) == [f".a.{living.pid}.partial.json", precious.name, "a.json"]
    living.kill()
    living.communicate()


def test_a_small_file_is_put_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"first", b"second"):
        put_file(path, content)
        assert path.read_bytes() == content
    (tmp_path / "b.bin").mkdir()
    with pytest.raises(IsADirectoryError):
        put_file(tmp_path / "b.bin", b"third")
    assert names(tmp_path) == ["a.bin", "b.bin"]
