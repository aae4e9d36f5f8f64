"""What a client is told when a request is not answered, in the form that OpenAI's API gives errors."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Literal

UnavailableReason = Literal[
    "queue_full", "expected_wait", "draining", "breaker_open", "worker_died", "loading", "banned"
]


@dataclass
class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        message: What was given, what is allowed and what to do next.
        param: The field that it is about, as `messages[0].content[1]`; None where it is about none.
        code: A word for programs; it stays when the message changes.
        retry_after_s: When trying again makes sense, or None.
        evidence: SHA-256 of the text or picture that it is about, for the incident log.
        status: The HTTP status of the kind.
        kind: What OpenAI's API calls the kind.
    """

    message: str
    param: str | None = None
    code: str = "invalid_value"
    retry_after_s: float | None = None
    evidence: tuple[str, ...] = ()

    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    kind: ClassVar[str] = "invalid_request_error"

    def __str__(self) -> str:
        """The message."""
        return self.message

    def body(self) -> dict[str, Any]:
        """The JSON document that the client gets."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class InvalidRequestError(RequestError):
    """400: the request is malformed, or asks for what is not offered."""


class UnauthorizedError(RequestError):
    """401: there is no key, or not a known one."""

    status = HTTPStatus.UNAUTHORIZED
    kind = "authentication_error"


class NotFoundError(RequestError):
    """404: there is no such model or path."""

    status = HTTPStatus.NOT_FOUND


class SlowBodyError(RequestError):
    """408: the body did not arrive in time."""

    status = HTTPStatus.REQUEST_TIMEOUT


class TooLargeError(RequestError):
    """413: the body or a picture is larger than allowed."""

    status = HTTPStatus.CONTENT_TOO_LARGE if hasattr(HTTPStatus, "CONTENT_TOO_LARGE") else HTTPStatus(413)


class UnsupportedMediaError(RequestError):
    """415: a picture is of a format that is not taken, or not of the one that is declared."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class UnprocessableError(RequestError):
    """422: a picture is of a known format, but cannot be decoded."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class RateLimitedError(RequestError):
    """429: too many requests of one client; `retry_after_s` is always given."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    kind = "rate_limit_error"


class EngineFailedError(RequestError):
    """500: the bundle's runtime raised an error. It counts for the circuit breaker; nothing else does."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    kind = "server_error"


class UnavailableError(RequestError):
    """503: not now; `code` is one of `UnavailableReason`, `retry_after_s` is always given."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    kind = "server_error"


class DeadlineError(RequestError):
    """504: the answer was not there in time."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    kind = "server_error"


class CancelledError(RequestError):
    """499: the client left, so nobody reads this."""

    kind = "cancelled"
