import os

import pytest

from fastvlm_convert.bundle.folder import QUANTIZED_CHECKPOINT
from fastvlm_convert.bundle.resumable import partial_folder, resumable_folder
from fastvlm_convert.errors import CheckpointError, OutputError


def folder(output, key="a", overwrite=False, protected=()):
    return resumable_folder(output, key, overwrite, list(protected), QUANTIZED_CHECKPOINT)


def work_until(error, output, *steps, key="a"):
    """A run that finishes some steps, then meets an error."""
    with folder(output, key) as work:
        for step in steps:
            work.claim([step])
            (work.folder / step).write_text(f"{step} of {key}")
            work.finish(step, {"sum": 0.1})
        raise error("stopped")


def interrupted(output, *steps, key="a", error=KeyboardInterrupt):
    with pytest.raises(error):
        work_until(error, output, *steps, key=key)


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_a_whole_run_leaves_the_output_alone(tmp_path):
    output = tmp_path / "new" / "out"
    with folder(output) as work:
        assert (work.folder, work.finished) == (partial_folder(output), {})
        work.claim(["x"])
        (work.folder / "x").write_text("x")
        work.finish("x", None)
    assert names(output) == ["x"]
    assert names(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OutputError])
def test_an_interrupted_run_goes_on(tmp_path, error):
    output = tmp_path / "out"
    interrupted(output, "x", "y", error=error)
    assert names(tmp_path) == ["out.partial"]
    with folder(output) as work:
        assert work.finished == {"x": {"sum": 0.1}, "y": {"sum": 0.1}}
        work.finish("z", 3)
    assert names(output) == ["x", "y"]
    assert names(tmp_path) == ["out"]


def test_a_third_run_knows_the_steps_of_both(tmp_path):
    output = tmp_path / "out"
    interrupted(output, "x")
    interrupted(output, "y")
    with folder(output) as work:
        assert list(work.finished) == ["x", "y"]


@pytest.mark.parametrize("tail", [b"", b"\0\0\0", b"\0\0\n", b"[1]\n", b"3\n"])
def test_a_step_whose_note_was_cut_off_is_not_finished(tmp_path, tail):
    output = tmp_path / "out"
    interrupted(output, "x", "y")
    (progress,) = [p for p in partial_folder(output).iterdir() if p.name not in "xy"]
    *lines, y = progress.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4  # the key, two claims, the first step
    progress.write_bytes(b"".join(lines) + (tail or y[:-3]))
    interrupted(output, "z")
    with folder(output) as work:
        assert list(work.finished) == ["x", "z"]


def test_another_key_starts_anew(tmp_path):
    output = tmp_path / "out"
    interrupted(output, "x")
    (partial_folder(output) / "deep").mkdir()
    interrupted(output, "y", key="b")
    assert "x" not in names(partial_folder(output))
    with folder(output, "b") as work:
        assert list(work.finished) == ["y"]
    assert names(output) == ["y"]


def test_an_error_of_the_input_leaves_nothing(tmp_path):
    interrupted(tmp_path / "new" / "out", "x", error=CheckpointError)
    assert names(tmp_path) == []


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_is_not_ours_is_not_touched(tmp_path, what):
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "mine").write_text("mine")
    if what == "folder":
        precious.rename(partial)
    elif what == "file":
        partial.write_text("mine")
    else:
        partial.symlink_to(precious)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="in the way"), folder(output):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_two_runs_do_not_work_on_one_folder(tmp_path):
    with folder(tmp_path / "out") as work:
        with pytest.raises(OutputError, match="another run is working here"), folder(tmp_path / "out"):
            pass
        work.finish("x", None)
    assert names(tmp_path) == ["out"]


def test_an_input_is_safe(tmp_path):
    checkpoint = tmp_path / "out.partial"
    checkpoint.mkdir()
    with pytest.raises(OutputError, match="holds an input"), folder(tmp_path / "out", protected=[checkpoint]):
        pass
    assert names(checkpoint) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write here"), folder(tmp_path / "out"):
        pass
