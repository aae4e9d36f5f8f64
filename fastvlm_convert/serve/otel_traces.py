"""Traces with OpenTelemetry's SDK; imported only where they are asked for (`traces.py`)."""

import threading
import time
from typing import Any, Final

from fastapi import FastAPI
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context

from fastvlm_convert.serve.engine import Reply
from fastvlm_convert.serve.traces import TracedAnswer

_QUIET: Final = "livez,readyz,health,metrics"  # asked for every few seconds, by machines
_CLOSE_S: Final = 2.0  # the SDK tries for 10 seconds, in which the server would not end
_PRIVATE: Final = ("http.url", "url.full", "url.query", "net.peer.ip", "client.address")
"""Attributes that tell who asked, or hold what clients put behind a question mark."""


class OtelTraces:
    """Records spans: the request, below it the answer, below that its stages."""

    def __init__(self, provider: TracerProvider, version: str) -> None:
        """Record with a provider."""
        self._provider = provider
        self._tracer = provider.get_tracer("fastvlm_convert.serve", version)

    def instrument(self, app: FastAPI) -> None:
        """Give every request a span, below the caller's (W3C `traceparent`); probes and scrapes get none."""
        FastAPIInstrumentor.instrument_app(
            app,
            server_request_hook=_redact,
            tracer_provider=self._provider,
            excluded_urls=_QUIET,
            exclude_spans=["receive", "send"],
        )

    def answered(self, answer: TracedAnswer) -> None:
        """Record an answer that ends now, and its stages, one after the other from its start."""
        ended = time.time_ns()
        started = ended - _ns(answer.seconds)
        span = self._tracer.start_span(
            f"chat {answer.model}", kind=SpanKind.INTERNAL, attributes=_attributes(answer), start_time=started
        )
        if answer.error is not None:
            span.set_status(Status(StatusCode.ERROR, answer.error))
        if answer.reply is not None:
            self._stages(answer.reply, set_span_in_context(span), started, ended)
        span.end(ended)

    def _stages(self, reply: Reply, parent: Context, started: int, ended: int) -> None:
        """Spans of the stages that took time; those that a cache spared have none."""
        for name, milliseconds in vars(reply.timings).items():
            if milliseconds > 0:
                stage_end = min(started + _ns(milliseconds / 1000), ended)
                span = self._tracer.start_span(name.removesuffix("_ms"), parent, start_time=started)
                span.end(stage_end)
                started = stage_end

    def close(self) -> None:
        """Send what was recorded and not sent; what a collector does not take in time is lost."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_CLOSE_S)


def open_exported(exporter: str, version: str) -> OtelTraces:
    """Traces that are sent.

    Args:
        exporter: `otlp` or `console`.
        version: Of this program; a part of the resource.
    """
    ours = Resource({SERVICE_NAME: "fastvlm-convert", SERVICE_VERSION: version})
    resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    sent = ConsoleSpanExporter() if exporter == "console" else OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(sent))
    return OtelTraces(provider, version)


def _redact(span: Span, _scope: dict[str, Any]) -> None:
    """Overwrite what tells who asked; attributes cannot be taken away."""
    if isinstance(span, ReadableSpan) and span.attributes is not None:
        for name in _PRIVATE:
            if name in span.attributes:
                span.set_attribute(name, "REDACTED")


def _attributes(answer: TracedAnswer) -> dict[str, str | int | float | tuple[str, ...]]:
    """OpenTelemetry's names for generative models; ours for what they have no name for."""
    sampling, reply = answer.sampling, answer.reply
    values: dict[str, str | int | float | tuple[str, ...] | None] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fastvlm-convert",
        "gen_ai.request.model": answer.model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.response.id": answer.request_id,
        "gen_ai.server.request.duration": answer.seconds,
        "gen_ai.server.time_to_first_token": answer.first_token_s,
        "error.type": answer.error,
    }
    if reply is not None:
        values |= {
            "gen_ai.response.model": answer.model,
            "gen_ai.response.finish_reasons": (reply.finish_reason,),
            "gen_ai.usage.input_tokens": reply.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": reply.cached_tokens,
            "gen_ai.usage.output_tokens": reply.answer_tokens,
            "fastvlm.cache": reply.cache,
        }
    return {name: value for name, value in values.items() if value is not None}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
