"""The incident log: what was found in requests, as JSON lines without anything that a client sent.

A line has the time, the rule, what was done, the request's id, and hashes: the client's is the one of the
access log, and texts and pictures have their SHA-256, so that whoever has one can look for it.
"""

import json
import logging
import os
import queue
import stat
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Final, Literal

from fastvlm_convert.serve.settings import SettingsError

Action = Literal["record", "block", "reject", "ban"]

MAX_BYTES: Final = 10_000_000
BACKUPS: Final = 5
_MAX_WAITING: Final = 1000  # lines on their way to the disk
_LOG: Final = logging.getLogger(__name__)


class IncidentLog:
    """Counts incidents, and writes them to a file if there is one, in a thread of its own.

    Requests never wait for the disk, and never fail because of it: what cannot be written is counted, and
    said once until writing works again.

    Attributes:
        total: Incidents so far.
    """

    def __init__(
        self,
        path: Path | None,
        hash_client: Callable[[str], str],
        clock: Callable[[], float] = time.time,
        max_bytes: int = MAX_BYTES,
        backups: int = BACKUPS,
    ) -> None:
        """Open the log.

        Args:
            path: The file, made readable for its owner alone; None counts incidents only.
            hash_client: Names clients; the access log's, so that lines of both go together.
            clock: Seconds since 1970.
            max_bytes: Where a file is put aside as `.1`, what was `.1` as `.2`, and so on.
            backups: How many are kept.

        Raises:
            SettingsError: The file cannot be written.
        """
        self.total = 0
        self._dropped = 0
        self._clock = clock
        self._hash_client = hash_client
        self._handler: _PrivateFile | None = None
        if path is None:
            return
        try:
            self._handler = _PrivateFile(path, max_bytes, backups)
        except OSError as error:
            raise SettingsError(
                f"incidents cannot be written: {error.strerror}",
                ("incident_log",),
                where=path,
                hint="name a file in a folder that the server's user may write",
            ) from error
        self._queue: queue.Queue[logging.LogRecord] = queue.Queue(_MAX_WAITING)
        self._listener = QueueListener(self._queue, self._handler)
        self._listener.start()

    @property
    def lost(self) -> int:
        """Incidents that could not be written."""
        return self._dropped + (0 if self._handler is None else self._handler.failures)

    def record(
        self,
        rule: str,
        action: Action,
        *,
        client: str,
        request_id: str,
        evidence: Sequence[str] = (),
    ) -> None:
        """Count an incident, and have it written.

        Args:
            rule: Which rule of threats.yaml.
            action: What was done.
            client: Who sent the request; hashed before it is written.
            request_id: The reply's `x-request-id`.
            evidence: SHA-256 of the texts or pictures that it is about, in hexadecimal.
        """
        self.total += 1
        if self._handler is None:
            return
        line = {
            "time": datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
            "rule": rule,
            "action": action,
            "request_id": request_id,
            "client": self._hash_client(client),
            "sha256": list(evidence),
        }
        record = logging.LogRecord(__name__, logging.INFO, "", 0, json.dumps(line), None, None)
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits, and close the file."""
        if self._handler is not None:
            self._listener.stop()
            self._handler.close()


class _PrivateFile(RotatingFileHandler):
    """A rotated file that nobody but its owner reads, and whose failures are counted.

    Attributes:
        failures: Lines that could not be written.
    """

    def __init__(self, path: Path, max_bytes: int, backups: int) -> None:
        self.failures = 0
        self._is_failing = False
        super().__init__(path, maxBytes=max_bytes, backupCount=backups, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self.baseFilename, flags, 0o600)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.fchmod(descriptor, 0o600)
            return open(descriptor, "a", encoding="utf-8")  # noqa: PTH123  a descriptor, not a path
        except BaseException:
            os.close(descriptor)
            raise

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; `handleError` is called if that fails."""
        before = self.failures
        super().emit(record)
        if self.failures == before:
            self._is_failing = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Count a line that could not be written; say so if the one before was."""
        self.failures += 1
        if not self._is_failing:
            _LOG.warning("incidents cannot be written to %s: %s", self.baseFilename, sys.exc_info()[1])
        self._is_failing = True

    def close(self) -> None:
        """Close the file; what the disk does not take is lost, and counted already."""
        try:
            super().close()
        except OSError:
            self.stream = None
            super().close()
