"""Values that outlive the server: JSON in an SQLite file, which several servers can share on one machine."""

import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

_LOG: Final = logging.getLogger(__name__)

FILE_NAME: Final = "answers-1.sqlite"
"""The number counts up when the table or the values change; other versions have files of their own."""
MAX_ROWS: Final = 1000
_BUSY_MS: Final = 50
_RETRY_S: Final = 60.0
_BUSY_CODES: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY, value TEXT NOT NULL, digest TEXT NOT NULL, stored_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_age ON answers (stored_at);
"""
_PUT: Final = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)"
_GET: Final = "SELECT value, digest, stored_at FROM answers WHERE key = ?"
# What is from the future was stored before the clock was set back; it would be the last to make room.
_EXPIRE: Final = "DELETE FROM answers WHERE stored_at <= ? OR stored_at > ?"
_SHRINK: Final = (
    "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY stored_at DESC LIMIT -1 OFFSET ?)"
)


class DiskCache:
    """Values of the last hours, in a file that its owner alone can read.

    A file that is damaged, locked, full or cannot be written is as good as an empty one: there is one
    warning, and a minute later it is tried again. All methods can be called from several threads.

    Args:
        folder: Where the file is; made if it is missing. On a local disk: SQLite's log needs shared memory.
        ttl_s: Seconds that a value is used.
        max_rows: Most values; the oldest make room.
        clock: `time.time`.
    """

    def __init__(
        self,
        folder: Path,
        ttl_s: float,
        max_rows: int = MAX_ROWS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = folder / FILE_NAME
        self._ttl_s = ttl_s
        self._max_rows = max_rows
        self._clock = clock
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._closed_until = -float("inf")
        self._has_warned = False

    def get(self, key: str) -> dict[str, Any] | None:
        """The value of a key; None where there is none that can be read."""
        with self._lock:
            row = self._try(lambda db: db.execute(_GET, (key,)).fetchone())
        if row is None:
            return None
        value, digest, stored_at = row
        is_fresh = isinstance(stored_at, float) and 0 <= self._clock() - stored_at < self._ttl_s
        if not is_fresh or not isinstance(value, str) or digest != _digest(key, value, stored_at):
            return None
        found: dict[str, Any] = json.loads(value)  # our own text, as its digest shows
        return found

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep a value.

        Args:
            key: Its key.
            value: What JSON can hold.
        """
        text, now = json.dumps(value), float(self._clock())

        def write(db: sqlite3.Connection) -> None:
            with db:
                db.execute(_PUT, (key, text, _digest(key, text, now), now))
                db.execute(_EXPIRE, (now - self._ttl_s, now))
                db.execute(_SHRINK, (self._max_rows,))

        with self._lock:
            self._try(write)

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            self._disconnect()

    def _try(self, action: Callable[[sqlite3.Connection], Any]) -> Any:  # noqa: ANN401
        """What an action gives; None where the file does not allow it."""
        if time.monotonic() < self._closed_until:
            return None
        try:
            if self._connection is None:
                self._connection = self._connect()
            return action(self._connection)
        except (sqlite3.Error, OSError, UnicodeError) as error:
            self._warn(error)
            # The lowest byte is the kind; the others say more, as that somebody recovers the log just now.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _BUSY_CODES:
                self._disconnect()
                self._closed_until = time.monotonic() + _RETRY_S
            return None

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its log the mode of this file. A link could make us write to someone else's.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            os.chmod(self.path, 0o600)  # noqa: PTH101  it may be older than this rule
        finally:
            os.close(descriptor)
        db = sqlite3.connect(self.path, timeout=_BUSY_MS / 1000, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(_TABLE)
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            _LOG.warning(
                "%s cannot be used, so answers are not kept beyond this server's memory: %s", self.path, error
            )


def _digest(key: str, value: str, stored_at: float) -> str:
    """SQLite does not notice when bytes of a value are damaged."""
    text = f"{key} {stored_at!r} {value}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
