"""Parts of the engine `processes` that need no process: messages, backoff, memory, and what is logged."""

import asyncio
import logging
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_convert.errors import BundleError, error_class
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.serve import errors
from fastvlm_convert.serve.engine import Piece, Question, Reply, Sampling, StageTimings
from fastvlm_convert.serve.engines.processes import Backoff
from fastvlm_convert.serve.engines.worker_memory import available_bytes, check_memory
from fastvlm_convert.serve.engines.worker_messages import (
    CacheState,
    caches_of,
    error_frame,
    failed_frame,
    failure_of,
    item_frame,
    item_of,
    question_frame,
    question_of,
)
from fastvlm_convert.serve.engines.worker_stderr import WorkerStderr
from fastvlm_convert.serve.settings import SettingsError

CACHES = CacheState({"feature": 5, "prefix": 7}, {("feature", "hit"): 1, ("prefix", "miss"): 2})
PROMPT = Prompt(
    (np.array([1, 2], np.int64), np.array([], np.int64), np.array([3], np.int64)),
    (np.zeros((1, 3, 2, 2), np.float32), np.ones((1, 3, 2, 2), np.float32)),
    ((0, 1), (2, 0)),
)
SAMPLING = Sampling(7, 0.5, 0.9, 3, ("a", "b"))


def test_a_question_arrives_with_all_that_it_has():
    sent = Question("id", PROMPT, ("k", "l"), SAMPLING, 100.0, threading.Event(), wants_logprob=True)
    cancelled = threading.Event()
    got = question_of(question_frame(sent, lambda: 90.0), cancelled, lambda: 5.0)
    assert got.deadline == 15.0
    assert got.cancelled is cancelled
    for field in fields(Question):
        if field.name not in ("prompt", "deadline", "cancelled"):
            assert getattr(got, field.name) == getattr(sent, field.name), field.name
    assert got.prompt.answers_at == PROMPT.answers_at
    for name in ("segments", "images"):
        for one, other in zip(getattr(got.prompt, name), getattr(PROMPT, name), strict=True):
            np.testing.assert_array_equal(one, other)
    # A field that is added must be sent, too: this fails until it is.
    assert {field.name for field in fields(Prompt)} == {"segments", "images", "answers_at"}


@pytest.mark.parametrize(
    "item",
    [
        Piece("text", 3, "feature"),
        Reply("text", "length", 40, 16, 3, StageTimings(1, 2, 3, 4), "prefix", -0.5),
    ],
)
def test_items_arrive_as_they_were(item):
    frame = item_frame(item, CACHES)
    assert item_of(frame) == item
    if isinstance(item, Reply):
        assert caches_of(frame) == CACHES


def all_errors() -> list[type[errors.RequestError]]:
    return [*errors.RequestError.__subclasses__()]


@pytest.mark.parametrize("kind", all_errors())
def test_errors_arrive_as_they_were(kind):
    error = kind("message", "param", "code", 2.5)
    got = item_of(error_frame(error, CACHES))
    assert type(got) is kind
    assert got == error
    assert caches_of(error_frame(error, CACHES)) == CACHES


def test_why_a_bundle_does_not_load_arrives_as_it_was():
    error = BundleError("it is damaged", where="decoder.onnx", hint="copy it again")
    got = failure_of(failed_frame(error))
    assert type(got) is BundleError is error_class("bundle")
    assert (str(got), got.hint) == (str(error), error.hint)


def test_a_worker_is_started_again_later_and_later():
    backoff = Backoff()
    assert [backoff.delay_s(0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert backoff.delay_s(59.9) == 30
    assert backoff.delay_s(60) == 0.5  # a minute of health
    assert backoff.delay_s(0) == 1


@given(st.lists(st.floats(0, 1000), min_size=1))
def test_restarts_never_loop_hot(lives):
    backoff = Backoff()
    delays = [backoff.delay_s(life) for life in lives]
    assert all(0.5 <= delay <= 30 for delay in delays)
    for before, after, life in zip(delays, delays[1:], lives[1:], strict=False):
        assert after == (0.5 if life >= 60 else min(30, 2 * before))


def test_more_workers_than_memory_holds_are_refused():
    check_memory(3, 100, 300)
    with pytest.raises(SettingsError, match="4 workers need") as caught:
        check_memory(4, 100, 300)
    assert caught.value.hint == "set max_workers to 3"
    with pytest.raises(SettingsError) as caught:
        check_memory(1, 100, 99)
    assert "free memory" in str(caught.value.hint)
    with pytest.raises(SettingsError, match="at most 16"):
        check_memory(17, 1, 1 << 40)


def _write(folder, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_the_limit_of_a_container_counts(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/pod/app\n")
    _write(tmp_path / "pod" / "app", memory__max="max", memory__current=50)
    assert available_bytes(tmp_path, membership) > 10_000
    _write(tmp_path / "pod", memory__max=5000, memory__current=4000, memory__stat="anon 1\ninactive_file 300")
    assert available_bytes(tmp_path, membership) == 1300
    _write(tmp_path / "pod" / "app", memory__max=900, memory__current=1000)
    assert available_bytes(tmp_path, membership) == 0


def test_the_limit_of_an_old_container_counts(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("5:devices:/\n4:memory,hugetlb:/docker/x\n")
    _write(
        tmp_path / "memory" / "docker" / "x",
        memory__limit_in_bytes=5000,
        memory__usage_in_bytes=4000,
        memory__stat="inactive_file 7\ntotal_inactive_file 300",
    )
    assert available_bytes(tmp_path, membership) == 1300


def test_without_containers_what_is_free_counts(tmp_path):
    assert available_bytes(tmp_path, tmp_path / "missing") > 10_000


def read_lines(stderr: WorkerStderr, *blocks: bytes) -> None:
    async def read() -> None:
        reader = asyncio.StreamReader()
        for block in blocks:
            reader.feed_data(block)
        reader.feed_eof()
        await stderr.read(reader)

    asyncio.run(read())


def test_what_a_worker_writes_is_logged_shortened_and_not_without_end(caplog):
    caplog.set_level(logging.WARNING)
    now = [0.0]
    stderr = WorkerStderr(3, lambda: now[0])
    read_lines(stderr, b"one\ntw", b"o\n" + b"x" * 5000 + b"\n\x1b[31mred\xff")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["worker 3: one", "worker 3: two"]
    assert len(lines[2]) < 600
    assert lines[3] == "worker 3: \\x1b[31mred\ufffd"
    assert stderr.last_words() == lines[3].removeprefix("worker 3: ")

    caplog.clear()
    read_lines(stderr, b"again\n" * 1000)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) < 110
    assert lines[-1].endswith("904 more lines are left out")
    caplog.clear()
    now[0] = 61.0
    read_lines(stderr, b"next minute\n", b"y" * 1_000_000)
    assert [len(record.getMessage()) < 600 for record in caplog.records] == [True, True]


def test_frames_of_a_question_hold_no_copy_of_its_pictures():
    question = Question("id", PROMPT, ("k", "l"), SAMPLING, 1.0)
    frame = question_frame(replace(question, sampling=SAMPLING))
    assert any(array is PROMPT.images[0] for array in frame.arrays)
