"""Traces of requests, where OpenTelemetry's standard environment asks for them.

Without it, nothing of OpenTelemetry is imported and recording costs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from fastvlm_convert.errors import MissingDependencyError, UsageError, shown
from fastvlm_convert.serve.engine import Reply, Sampling

if TYPE_CHECKING:
    from fastapi import FastAPI

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
EXPORTERS: Final = ("otlp", "console", "none")


@dataclass(frozen=True)
class TracedAnswer:
    """What a trace tells of a request to a bundle; no text of it.

    Attributes:
        model: The bundle's name.
        request_id: The reply's `x-request-id`.
        sampling: How the answer was chosen.
        seconds: From the request to the last byte.
        first_token_s: From the request to the first token; None where there was none.
        reply: The answer; None where there was none.
        error: The error's `code`; None with an answer.
    """

    model: str
    request_id: str
    sampling: Sampling
    seconds: float
    first_token_s: float | None = None
    reply: Reply | None = None
    error: str | None = None


class Traces(Protocol):
    """Records what becomes of requests."""

    def instrument(self, app: "FastAPI") -> None:
        """Give every request a span, below the caller's (W3C `traceparent`); once, before they come."""
        ...

    def answered(self, answer: TracedAnswer) -> None:
        """Record a request's stages below its span; call it where the request ends, in its own context."""
        ...

    def close(self) -> None:
        """Send what was recorded and not sent; takes two seconds if the collector does not answer."""
        ...


class NoTraces:
    """Records nothing."""

    def instrument(self, app: "FastAPI") -> None:
        """Leave the app as it is."""

    def answered(self, answer: TracedAnswer) -> None:
        """Forget it."""

    def close(self) -> None:
        """There is nothing to send."""


def exporter_name(environ: Mapping[str, str]) -> str:
    """Where traces go by the standard environment: one of `EXPORTERS`.

    They are sent if `OTEL_TRACES_EXPORTER` or an endpoint says so, unless `OTEL_SDK_DISABLED` is `true`.

    Raises:
        UsageError: `OTEL_TRACES_EXPORTER` names another, or the protocol is not HTTP's.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    has_endpoint = any(environ.get(name) for name in _ENDPOINTS)
    name = environ.get("OTEL_TRACES_EXPORTER", "").strip() or ("otlp" if has_endpoint else "none")
    if name not in EXPORTERS:
        raise UsageError(
            f"OTEL_TRACES_EXPORTER is {shown(name)}", hint=f"it can be one of {', '.join(EXPORTERS)}"
        )
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if name == "otlp" and protocol not in (None, "", "http/protobuf"):
        raise UsageError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {shown(protocol)}",
            hint="traces are sent as http/protobuf, to port 4318 of a collector",
        )
    return name


def open_traces(version: str, environ: Mapping[str, str]) -> Traces:
    """What records traces.

    Args:
        version: Of this program.
        environ: The environment; sampler, resource and headers, the SDK reads from the process's.

    Raises:
        UsageError: The environment asks for what is not offered.
        MissingDependencyError: It asks for traces, and the extra `otel` is not installed.
    """
    name = exporter_name(environ)
    if name == "none":
        return NoTraces()
    try:
        from fastvlm_convert.serve import otel_traces
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "sending traces") from error
    return otel_traces.open_exported(name, version)
