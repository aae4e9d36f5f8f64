"""Logs: a JSON object a line, or a line of text at a terminal.

No prompt, picture, key or address is logged. Clients appear as hashes that hold for one run of the server, an
exception as its type and place, since its message may quote what a client sent. Control characters are
escaped in both forms, so nobody can forge a line.
"""

import hashlib
import hmac
import json
import logging
import secrets
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from fastvlm_convert.errors import printable, shortened
from fastvlm_convert.serve.engine import CacheUse, StageTimings

LogForm = Literal["auto", "json", "text"]
"""`auto` is `text` at a terminal, and `json` elsewhere."""

MAX_VALUE: Final = 200  # characters of one value
_ACCESS: Final = logging.getLogger("fastvlm_convert.serve.access")


@dataclass(frozen=True)
class Access:
    """What is logged of a request.

    Attributes:
        request_id: The reply's `x-request-id`.
        client: As `ClientHasher` gives it; never the address or the key.
        route: The path as it is declared, not as it was sent.
        code: The HTTP status; 499 where the client left.
        seconds: From its arrival to the last byte.
        model: The bundle that answered; None where there was none.
        cache: The best cache that the answer came from.
        timings: Where the time went; None without an answer.
        prompt_tokens: Tokens of the prompt.
        answer_tokens: Tokens generated.
        error: The error's `code`.
    """

    request_id: str
    client: str
    route: str
    code: int
    seconds: float
    model: str | None = None
    cache: CacheUse | None = None
    timings: StageTimings | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    error: str | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of the line; those that are None are left out."""
        timings = {} if self.timings is None else vars(self.timings)
        values = {
            "request_id": self.request_id,
            "client": self.client,
            "route": self.route,
            "model": self.model,
            "code": self.code,
            "error": self.error,
            "cache": self.cache,
            "total_ms": round(self.seconds * 1000, 3),
            **{name: round(milliseconds, 3) for name, milliseconds in timings.items()},
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ClientHasher:
    """Names for clients; with a secret in them, since there are too few addresses for a plain hash."""

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def __call__(self, client: str) -> str:
        """The name of a client, 16 hexadecimal digits.

        Args:
            client: Its address, or the id of its key.
        """
        return hmac.new(self.secret, client.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:16]


def log_access(access: Access) -> None:
    """Log a request that ended: as an error from 500, for information below."""
    level = logging.ERROR if access.code >= 500 else logging.INFO
    _ACCESS.log(level, "request", extra={"fields": access.fields()})


def set_up_logs(form: LogForm, stream: TextIO, level: int = logging.INFO) -> None:
    """Send every log of this process, those of uvicorn too, to a stream; replaces what was set up before.

    uvicorn must leave logging alone (`log_config=None`) and log no requests itself (`access_log=False`): its
    lines have addresses and paths as clients send them.

    Args:
        form: How lines look.
        stream: Where they go; standard error, for a server.
        level: Of ours and of uvicorn's; requests are logged for information.
    """
    is_text = form == "text" or (form == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if is_text else JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    # Libraries log at lower levels what must not be logged: sse-starlette every piece of an answer, for one.
    root.setLevel(logging.WARNING)
    for name in ("fastvlm_convert", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(level)
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        document = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        return json.dumps(document, default=lambda value: type(value).__name__)


class TextFormatter(logging.Formatter):
    """A record as one line for people: the time, the level, the message, and fields as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = f"{_time(record)[11:19]} {record.levelname:<7} {printable(record.getMessage())}"
        return " ".join([line, *(f"{name}={_quoted(value)}" for name, value in _fields(record).items())])


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What `extra={"fields": ...}` brought, texts shortened, and where an exception came from."""
    given: Mapping[str, Any] = getattr(record, "fields", {})
    fields = {n: shortened(v, MAX_VALUE) if isinstance(v, str) else v for n, v in given.items()}
    exception = record.exc_info[1] if record.exc_info else None
    return fields if exception is None else {**fields, "exception": _origin(exception)}


def _origin(exception: BaseException) -> str:
    """The types of an exception and its causes, and where each was raised: no message, no source lines."""
    found: list[str] = []
    current: BaseException | None = exception
    while current is not None and len(found) < 5:
        frames = traceback.extract_tb(current.__traceback__)[-3:]
        places = " > ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames)
        found.append(f"{type(current).__name__} at {places or 'unknown'}")
        current = current.__cause__ or current.__context__
    return "; from ".join(found)


def _quoted(value: object) -> str:
    text = printable(str(value))
    return json.dumps(text, ensure_ascii=False) if not text or {" ", '"', "="} & set(text) else text
