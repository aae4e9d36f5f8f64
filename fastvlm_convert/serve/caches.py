"""Caches: values in memory up to a number of bytes, and whole answers that also go to a file."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Final, Generic, TypeVar

from cachetools import LRUCache

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.errors import ConversionError
from fastvlm_convert.serve.disk_cache import DiskCache
from fastvlm_convert.serve.engine import Reply
from fastvlm_convert.serve.settings import Settings

V = TypeVar("V")

MAX_ANSWERS: Final = 100
MAX_ANSWER_BYTES: Final = 8_000_000
_DISK_S: Final = 0.25  # that a question waits for the file; a folder on a network can hang
_MAX_WAITING: Final = 100  # answers to be written; of a disk that cannot keep up, more are left out


def cache_key(*parts: str | bytes) -> str:
    """SHA-256 of the parts and their lengths, in hexadecimal: other parts have another key.

    Args:
        parts: A text and its UTF-8 bytes are different parts.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"s" if isinstance(part, str) else b"b")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


class ByteCache(Generic[V]):
    """The values used last, up to a number of bytes. All methods can be called from several threads.

    Args:
        max_bytes: Of all values; a value larger than that is not kept. 0 keeps nothing.
        size_of: Bytes of a value; asked once for each, and must not change while it is kept.
        max_entries: Most values, however small.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[V], int], max_entries: int | None = None) -> None:
        self._size_of = size_of
        self._max_entries = max_entries
        self._values: LRUCache[str, tuple[V, int]] = LRUCache(max_bytes, getsizeof=lambda kept: kept[1])
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(self, key: str) -> V | None:
        """The value of a key; None where it is not there."""
        with self._lock:
            kept = self._values.get(key)
            self._hits += kept is not None
            self._misses += kept is None
        return None if kept is None else kept[0]

    def put(self, key: str, value: V) -> None:
        """Keep a value instead of the one that the key had; others make room for it."""
        size = max(1, self._size_of(value))
        with self._lock:
            self._values.pop(key, None)
            if size > self._values.maxsize:
                return
            self._values[key] = (value, size)
            if self._max_entries is not None and len(self._values) > self._max_entries:
                self._values.popitem()

    def discard(self, key: str) -> None:
        """Forget the value of a key, if it has one."""
        with self._lock:
            self._values.pop(key, None)

    def __len__(self) -> int:
        """Number of values."""
        return len(self._values)

    @property
    def bytes(self) -> int:
        """Bytes of all values."""
        return int(self._values.currsize)

    @property
    def hits(self) -> int:
        """How often a value was found."""
        return self._hits

    @property
    def misses(self) -> int:
        """How often none was."""
        return self._misses


@dataclass(frozen=True)
class KeptAnswer:
    """An answer in the cache.

    Attributes:
        reply: The whole of it.
        stored_at: `time.time()` when it was computed.
    """

    reply: Reply
    stored_at: float


class AnswerCache:
    """Whole answers: the latest in memory, all of them in a file if there is one.

    Args:
        l1: Those in memory.
        l2: Those in a file; None for none.
        ttl_s: Seconds that an answer is used, counted from when it was computed.
        clock: `time.time`.
    """

    def __init__(
        self,
        l1: ByteCache[KeptAnswer],
        l2: DiskCache | None = None,
        ttl_s: float = 3600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._l1 = l1
        self._l2 = l2
        self._ttl_s = ttl_s
        self._clock = clock
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="answer-cache") if l2 is not None else None
        self._num_waiting = 0
        self.hits = 0
        self.misses = 0

    @property
    def bytes(self) -> int:
        """Bytes of the answers in memory."""
        return self._l1.bytes

    async def get(self, key: str) -> Reply | None:
        """The answer of a key as it was put; None where there is none."""
        kept = self._l1.get(key)
        if kept is None:
            kept = await self._read(key)
            if kept is not None:
                self._l1.put(key, kept)
        if kept is not None and not 0 <= self._clock() - kept.stored_at < self._ttl_s:
            self._l1.discard(key)
            kept = None
        self.hits += kept is not None
        self.misses += kept is None
        return None if kept is None else kept.reply

    async def put(self, key: str, reply: Reply) -> None:
        """Keep an answer. It goes to the file in the background."""
        kept = KeptAnswer(reply, self._clock())
        self._l1.put(key, kept)
        if self._l2 is None or self._disk is None or self._num_waiting >= _MAX_WAITING:
            return
        self._num_waiting += 1
        writing = asyncio.get_running_loop().run_in_executor(self._disk, self._l2.put, key, asdict(kept))
        writing.add_done_callback(self._written)

    def _written(self, _: "asyncio.Future[None]") -> None:
        self._num_waiting -= 1

    async def close(self) -> None:
        """Write what is still to be written, and close the file."""
        if self._l2 is not None and self._disk is not None:
            await asyncio.get_running_loop().run_in_executor(self._disk, self._l2.close)
            self._disk.shutdown()

    async def _read(self, key: str) -> KeptAnswer | None:
        """From the file; a value that this version does not understand is none."""
        if self._l2 is None or self._disk is None:
            return None
        reading = asyncio.get_running_loop().run_in_executor(self._disk, self._l2.get, key)
        try:
            async with asyncio.timeout(_DISK_S):
                value = await reading
            return None if value is None else from_plain(KeptAnswer, value)
        except (TimeoutError, ConversionError):
            return None


def open_answer_cache(settings: Settings) -> AnswerCache | None:
    """The cache that the settings ask for; None where caches are off."""
    if not settings.cache_enabled:
        return None
    ttl_s = settings.cache_ttl_seconds
    l1: ByteCache[KeptAnswer] = ByteCache(MAX_ANSWER_BYTES, _answer_bytes, MAX_ANSWERS)
    l2 = None if settings.cache_dir is None else DiskCache(settings.cache_dir, ttl_s)
    return AnswerCache(l1, l2, ttl_s)


def _answer_bytes(kept: KeptAnswer) -> int:
    return len(kept.reply.text.encode("utf-8", "surrogatepass")) + 1000  # and what Python needs for the rest
