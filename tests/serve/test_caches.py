import asyncio
import json
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastvlm_convert.serve.caches import AnswerCache, ByteCache, cache_key, open_answer_cache
from fastvlm_convert.serve.disk_cache import FILE_NAME, DiskCache
from fastvlm_convert.serve.engine import Reply, StageTimings
from fastvlm_convert.serve.settings import Settings

REPLY = Reply(
    text="A red square \u2013 \ud83d and <b>text</b>.",
    finish_reason="stop",
    prompt_tokens=48,
    cached_tokens=20,
    answer_tokens=9,
    timings=StageTimings(0.5, 22.0, 5.25, 3.0),
    cache="prefix",
    mean_logprob=-0.125,
)


class Clock:
    def __init__(self):
        self.now = 1_700_000_000.0

    def __call__(self):
        return self.now


def answer_cache(l2=None, ttl_s=60.0, clock=time.time):
    return AnswerCache(ByteCache(1 << 20, lambda kept: len(kept.reply.text), 100), l2, ttl_s, clock)


# Keys.


def test_keys_are_sha256_of_the_parts_with_their_lengths():
    assert cache_key("a") == cache_key("a")
    assert len(bytes.fromhex(cache_key("a", b"b"))) == 32
    others = [cache_key("ab", "c"), cache_key("a", "bc"), cache_key("abc"), cache_key("abc", ""), cache_key()]
    others += [cache_key(b"abc"), cache_key("a" + "\0" * 7 + "\x01b"), cache_key("a", "b")]
    assert len(set(others)) == len(others)


@given(
    st.lists(st.text(max_size=3) | st.binary(max_size=3)),
    st.lists(st.text(max_size=3) | st.binary(max_size=3)),
)
def test_other_parts_have_another_key(one, other):
    same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (cache_key(*one) == cache_key(*other)) == same


# In memory.


class ByteMachine(RuleBasedStateMachine):
    """The bound on bytes holds at any time, and what is kept is what was used last."""

    def __init__(self):
        super().__init__()
        self.cache = ByteCache(100, len, max_entries=4)
        self.model: dict[str, bytes] = {}  # in the order of their use

    @rule(key=st.sampled_from("abcdefg"), size=st.integers(0, 130))
    def put(self, key, size):
        value = bytes(size)
        self.cache.put(key, value)
        self.model.pop(key, None)
        if size <= 100:
            self.model[key] = value
            while sum(max(1, len(v)) for v in self.model.values()) > 100 or len(self.model) > 4:
                del self.model[next(iter(self.model))]

    @rule(key=st.sampled_from("abcdefg"))
    def get(self, key):
        expected = self.model.get(key)
        hits, misses = self.cache.hits, self.cache.misses
        assert self.cache.get(key) is expected
        assert (self.cache.hits - hits, self.cache.misses - misses) == (
            (1, 0) if expected is not None else (0, 1)
        )
        if expected is not None:
            self.model[key] = self.model.pop(key)

    @rule(key=st.sampled_from("abcdefg"))
    def discard(self, key):
        self.cache.discard(key)
        self.model.pop(key, None)

    @invariant()
    def bytes_are_within_the_bound(self):
        assert len(self.cache) == len(self.model)
        assert self.cache.bytes == sum(max(1, len(v)) for v in self.model.values()) <= 100


TestByteCache = ByteMachine.TestCase


def test_a_value_larger_than_the_cache_takes_no_room_and_replaces_what_is_outdated():
    cache = ByteCache(10, len)
    cache.put("a", b"1234")
    cache.put("b", b"x" * 11)
    assert (cache.get("a"), cache.get("b"), cache.bytes) == (b"1234", None, 4)
    cache.put("a", b"x" * 11)
    assert (cache.get("a"), cache.bytes) == (None, 0)


def test_a_cache_of_no_bytes_keeps_nothing():
    cache = ByteCache(0, len)
    cache.put("a", b"")
    assert (cache.get("a"), len(cache)) == (None, 0)


def test_many_threads_at_once():
    cache = ByteCache(1000, len)
    faults = []

    def work(seed):
        for i in range(2000):
            key = str((i * 7 + seed) % 50)
            value = cache.get(key)
            if value is not None and value != key.encode() * 20:
                faults.append(value)
            cache.put(key, key.encode() * 20)
            if cache.bytes > 1000:
                faults.append(cache.bytes)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert cache.hits + cache.misses == 16_000


# In a file.


def test_values_outlive_the_process_until_they_expire(tmp_path):
    clock = Clock()
    value = {"text": "\u00e4 \ud83d", "list": [1, 2.5, None, True]}
    cache = DiskCache(tmp_path / "new" / "folder", 60, clock=clock)
    cache.put("a", value)
    cache.close()
    again = DiskCache(tmp_path / "new" / "folder", 60, clock=clock)
    assert again.get("a") == value
    assert again.get("b") is None
    clock.now += 59
    assert again.get("a") == value
    clock.now += 1
    assert again.get("a") is None
    clock.now -= 61  # the machine's clock was set back: how old the value is, is not known
    assert again.get("a") is None


def test_old_values_make_room(tmp_path):
    clock = Clock()
    cache = DiskCache(tmp_path, 1000, max_rows=3, clock=clock)
    for i in range(5):
        cache.put(str(i), {"i": i})
        clock.now += 1
    assert [cache.get(str(i)) for i in range(5)] == [None, None, {"i": 2}, {"i": 3}, {"i": 4}]
    clock.now += 1000
    cache.put("new", {})
    rows = sqlite3.connect(tmp_path / FILE_NAME).execute("SELECT key FROM answers").fetchall()
    assert rows == [("new",)]


def test_values_from_before_the_clock_was_set_back_make_room(tmp_path):
    clock = Clock()
    cache = DiskCache(tmp_path, 1000, max_rows=3, clock=clock)
    clock.now += 1_000_000
    for i in range(3):
        cache.put(f"future {i}", {})
    clock.now -= 1_000_000
    cache.put("now", {"i": 1})
    assert cache.get("now") == {"i": 1}


def test_others_cannot_read_the_file(tmp_path):
    before = os.umask(0)
    try:
        (tmp_path / FILE_NAME).touch(0o666)
        cache = DiskCache(tmp_path, 60)
        cache.put("a", {"secret": 1})
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert set(modes) == {FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"}
    assert set(modes.values()) == {0o600}


def test_values_are_json_and_not_pickled(tmp_path):
    cache = DiskCache(tmp_path, 60)
    cache.put("a", {"text": "hello"})
    (row,) = sqlite3.connect(cache.path).execute("SELECT value FROM answers").fetchall()
    assert json.loads(row[0]) == {"text": "hello"}
    with pytest.raises(TypeError):
        cache.put("a", {"text": object()})


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def no_use(cache: DiskCache, caplog) -> None:
    """It is a miss, without an error and with one warning that names the file."""
    for _ in range(3):
        assert cache.get("a") is None
        cache.put("a", {"x": 1})
    (warning,) = warnings_of(caplog)
    assert str(cache.path) in warning


def test_a_file_that_is_no_database(tmp_path, caplog):
    (tmp_path / FILE_NAME).write_bytes(b"no database at all " * 100)
    no_use(DiskCache(tmp_path, 60), caplog)
    assert (tmp_path / FILE_NAME).read_bytes() == b"no database at all " * 100


def test_a_database_of_something_else(tmp_path, caplog):
    other = sqlite3.connect(tmp_path / FILE_NAME)
    other.execute("CREATE TABLE answers (name TEXT)")
    other.close()
    no_use(DiskCache(tmp_path, 60), caplog)


def test_a_folder_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").touch()
    no_use(DiskCache(tmp_path / "file" / "folder", 60), caplog)


def test_a_link_is_not_followed(tmp_path, caplog):
    (tmp_path / "target").touch()
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "target")
    no_use(DiskCache(tmp_path, 60), caplog)
    assert (tmp_path / "target").read_bytes() == b""


def test_a_locked_file_is_a_miss_until_it_is_free(tmp_path, caplog):
    cache = DiskCache(tmp_path, 60)
    cache.put("a", {"x": 1})
    other = sqlite3.connect(cache.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    cache.put("b", {"x": 2})
    assert time.monotonic() - begun < 1
    assert len(warnings_of(caplog)) == 1
    other.execute("ROLLBACK")
    cache.put("b", {"x": 2})
    assert (cache.get("a"), cache.get("b")) == ({"x": 1}, {"x": 2})


def test_a_full_disk_is_a_miss(tmp_path, caplog):
    cache = DiskCache(tmp_path, 60)
    cache.put("a", {"x": 1})
    cache._connection.execute("PRAGMA max_page_count = 1")  # what SQLite says then is what a full disk says
    cache.put("b", {"x": "y" * 100_000})
    (warning,) = warnings_of(caplog)
    assert "full" in warning
    assert cache.get("b") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_a_miss(tmp_path, caplog):
    tmp_path.chmod(0o500)
    no_use(DiskCache(tmp_path, 60), caplog)


def test_a_file_that_is_read_only_is_a_miss(tmp_path, caplog):
    DiskCache(tmp_path, 60).put("a", {"x": 1})
    cache = DiskCache(tmp_path, 60)
    assert cache.get("a") == {"x": 1}
    cache._connection.execute("PRAGMA query_only = 1")  # root's files are never read-only
    cache.put("b", {"x": 2})
    assert cache.get("b") is None
    assert len(warnings_of(caplog)) == 1


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of a file with twenty values."""
    folder = tmp_path_factory.mktemp("written")
    cache = DiskCache(folder, 1e9)
    for i in range(20):
        cache.put(f"key {i}", {"text": f"answer {i} " * 20})
    cache.close()
    return (folder / FILE_NAME).read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_no_wrong_value(tmp_path_factory, written, data):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(written[: data.draw(st.integers(0, len(written)) | st.just(len(written)))])
    for _ in range(data.draw(st.integers(1, 20))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / FILE_NAME).write_bytes(content)
    cache = DiskCache(folder, 1e9)
    for i in range(20):
        assert cache.get(f"key {i}") in (None, {"text": f"answer {i} " * 20})
    cache.put("new", {"x": 1})
    assert cache.get("new") in (None, {"x": 1})
    cache.close()


def test_a_value_changed_in_place_is_noticed(tmp_path):
    cache = DiskCache(tmp_path, 60)
    cache.put("a", {"text": "a red square"})
    cache.close()
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b"a red square", b"a bad square"))
    assert DiskCache(tmp_path, 60).get("a") is None


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from fastvlm_convert.serve.disk_cache import DiskCache
    cache = DiskCache(Path(sys.argv[1]), 1e9, max_rows=100_000)
    for i in range(int(sys.argv[3])):
        key = f"{sys.argv[2]} {i}"
        cache.put(key, {"text": key * 50})
        if i % 10 == 0:
            print(i, flush=True)
""")


def writer(folder, name, count, **options):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_process_that_is_killed_while_it_writes_loses_nothing_of_before(tmp_path):
    for round_ in range(3):
        process = writer(tmp_path, f"round{round_}", 1_000_000)
        for line in process.stdout:
            if int(line) >= 100:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cache = DiskCache(tmp_path, 1e9, max_rows=100_000)
        for done in range(round_ + 1):
            for i in range(101):
                key = f"round{done} {i}"
                assert cache.get(key) == {"text": key * 50}
        cache.close()


def test_two_processes_at_once(tmp_path):
    names, count = ("one", "two"), 200
    processes = [writer(tmp_path, name, count) for name in names]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    cache = DiskCache(tmp_path, 1e9)
    kept = [
        key for name in names for i in range(count) if cache.get(key := f"{name} {i}") == {"text": key * 50}
    ]
    assert {key.split()[0] for key in kept} == set(names)  # one may have found the file locked now and then


# Whole answers.


def test_an_answer_comes_back_whole(tmp_path):
    async def run():
        cache = answer_cache(DiskCache(tmp_path, 60))
        assert await cache.get("k") is None
        await cache.put("k", REPLY)
        assert await cache.get("k") == REPLY
        await cache.close()
        later = answer_cache(DiskCache(tmp_path, 60))
        assert await later.get("k") == REPLY
        (tmp_path / FILE_NAME).unlink()
        assert await later.get("k") == REPLY  # in memory from then on
        await later.close()
        return cache, later

    cache, later = asyncio.run(run())
    assert (cache.hits, cache.misses) == (1, 1)
    assert (later.hits, later.misses) == (2, 0)
    assert later.bytes > 0


def test_an_answer_is_not_used_longer_because_it_was_asked_for(tmp_path):
    clock = Clock()

    async def run():
        cache = answer_cache(DiskCache(tmp_path, 60, clock=clock), 60, clock)
        await cache.put("k", REPLY)
        await cache.close()
        clock.now += 50
        cache = answer_cache(DiskCache(tmp_path, 60, clock=clock), 60, clock)
        assert await cache.get("k") == REPLY
        clock.now += 11
        assert await cache.get("k") is None
        assert cache.bytes == 0
        await cache.close()

    asyncio.run(run())


def test_an_answer_of_another_version_is_a_miss(tmp_path):
    disk = DiskCache(tmp_path, 60)
    disk.put("k", {"reply": {"text": "only"}, "stored_at": time.time()})
    disk.put("l", {})

    async def run():
        cache = answer_cache(disk)
        found = await cache.get("k"), await cache.get("l")
        await cache.close()
        return found

    assert asyncio.run(run()) == (None, None)


class SlowDisk(DiskCache):
    def get(self, key):
        time.sleep(0.6)
        return super().get(key)


def test_a_disk_that_hangs_is_a_miss_and_nobody_else_waits(tmp_path):
    async def run():
        cache = answer_cache(SlowDisk(tmp_path, 60))
        await cache.put("known", REPLY)
        slow = asyncio.create_task(cache.get("unknown"))
        await asyncio.sleep(0)
        begun = time.monotonic()
        assert await cache.get("known") == REPLY
        known_s = time.monotonic() - begun
        assert await slow is None
        waited_s = time.monotonic() - begun
        await cache.close()
        return known_s, waited_s

    known_s, waited_s = asyncio.run(run())
    assert known_s < 0.1
    assert waited_s < 0.55


def test_the_cache_is_the_one_of_the_settings(tmp_path):
    assert open_answer_cache(Settings(cache_enabled=False, cache_dir=tmp_path)) is None

    async def run():
        in_memory = open_answer_cache(Settings())
        on_disk = open_answer_cache(Settings(cache_dir=tmp_path / "l2"))
        for i in range(150):
            await in_memory.put(str(i), REPLY)
            await on_disk.put(str(i), REPLY)
            await asyncio.sleep(0.001)
        assert [await in_memory.get(str(i)) for i in range(150)] == [None] * 50 + [REPLY] * 100
        await on_disk.close()
        assert all([await on_disk.get(str(i)) == REPLY for i in range(50, 150)])

    asyncio.run(run())
    cache = DiskCache(tmp_path / "l2", Settings().cache_ttl_seconds)
    assert sum(cache.get(str(i)) is not None for i in range(150)) > 100
