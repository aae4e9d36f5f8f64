"""Spans as the SDK's own in-memory exporter sees them."""

import gzip
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fastvlm_convert.errors import MissingDependencyError, UsageError
from fastvlm_convert.serve.engine import Reply, Sampling, StageTimings
from fastvlm_convert.serve.otel_traces import OtelTraces
from fastvlm_convert.serve.traces import NoTraces, TracedAnswer, exporter_name, open_traces

REPLY = Reply("the answer", "stop", 48, 16, 12, StageTimings(5, 0, 20, 60), "feature")
ANSWER = TracedAnswer("int4", "req-1", Sampling(64, seed=7), 0.1, 0.03, REPLY)
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OtelTraces(provider, "1.2.3")


def served(traces, answer):
    """An app whose one route ends with an answer, streamed as the server does."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat():
        async def pieces():
            yield "some text"
            traces.answered(answer)

        return StreamingResponse(pieces())

    @app.get("/livez")
    async def livez():
        return {}

    traces.instrument(app)
    return TestClient(app)


def spans(exporter):
    return {span.name: span for span in exporter.get_finished_spans()}


def test_the_stages_are_below_the_answer_below_the_request_below_the_caller(traces, exporter):
    with served(traces, ANSWER) as client:
        client.post("/v1/chat/completions", headers={"traceparent": CALLER})
    found = spans(exporter)
    request, chat = found["POST /v1/chat/completions"], found["chat int4"]
    assert set(found) == {request.name, chat.name, "queue", "prefill", "decode"}
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {
        "0af7651916cd43dd8448eb211c80319c"
    }
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert chat.parent.span_id == request.context.span_id
    assert all(
        found[stage].parent.span_id == chat.context.span_id for stage in ("queue", "prefill", "decode")
    )


def test_the_spans_take_as_long_as_what_they_stand_for_and_follow_each_other(traces, exporter):
    traces.answered(ANSWER)
    found = spans(exporter)
    milliseconds = {name: (span.end_time - span.start_time) / 1e6 for name, span in found.items()}
    assert milliseconds == pytest.approx({"chat int4": 100, "queue": 5, "prefill": 20, "decode": 60})
    assert found["queue"].start_time == found["chat int4"].start_time
    assert found["prefill"].start_time == found["queue"].end_time
    assert found["decode"].start_time == found["prefill"].end_time


def test_the_attributes_have_the_names_of_opentelemetry(traces, exporter):
    traces.answered(ANSWER)
    assert dict(spans(exporter)["chat int4"].attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fastvlm-convert",
        "gen_ai.request.model": "int4",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.response.id": "req-1",
        "gen_ai.response.model": "int4",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 48,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.server.request.duration": 0.1,
        "gen_ai.server.time_to_first_token": 0.03,
        "fastvlm.cache": "feature",
    }


def test_a_failed_request_is_marked_with_its_code(traces, exporter):
    traces.answered(TracedAnswer("int4", "req-2", Sampling(64), 0.001, error="breaker_open"))
    [span] = exporter.get_finished_spans()
    assert not span.status.is_ok
    assert span.attributes["error.type"] == "breaker_open"
    assert "gen_ai.usage.input_tokens" not in span.attributes


def test_probes_have_no_spans_and_nothing_tells_who_asked(traces, exporter):
    with served(traces, ANSWER) as client:
        client.get("/livez")
        assert exporter.get_finished_spans() == ()
        client.post(
            "/v1/chat/completions?secret=planted",
            headers={"authorization": "Bearer planted"},
            json={"messages": [{"role": "user", "content": "planted"}]},
        )
    told = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "POST /v1/chat/completions" in told
    assert "planted" not in told
    assert "the answer" not in told
    assert '"net.peer.ip": "testclient"' not in told


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "none"),
        ({"OTEL_SERVICE_NAME": "x"}, "none"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, "none"),
        ({"OTEL_SDK_DISABLED": "True", "OTEL_TRACES_EXPORTER": "otlp"}, "none"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "otlp"),
    ],
)
def test_the_standard_environment_decides(environ, name):
    assert exporter_name(environ) == name


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"),
    ],
)
def test_what_is_not_offered_is_an_error(environ, named):
    with pytest.raises(UsageError, match=named) as error:
        open_traces("1", environ)
    assert error.value.hint


def test_without_the_environment_nothing_of_opentelemetry_is_imported():
    program = (
        "import sys; from fastvlm_convert.serve.traces import open_traces; traces = open_traces('1', {}); "
        "traces.close(); sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert isinstance(open_traces("1", {}), NoTraces)


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastvlm_convert.serve.otel_traces", None)
    monkeypatch.delattr("fastvlm_convert.serve.otel_traces", raising=False)
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fastvlm_convert.serve.otel_traces")
    with pytest.raises(MissingDependencyError, match="opentelemetry") as error:
        open_traces("1", {"OTEL_TRACES_EXPORTER": "console"})
    assert "[otel]" in error.value.hint


SENDS = (
    "import os, time; from fastvlm_convert.serve.traces import *; "
    "from fastvlm_convert.serve.engine import *; traces = open_traces('1.2.3', os.environ); "
    "traces.answered(TracedAnswer('int4', 'req-1', Sampling(64), 0.1)); began = time.monotonic(); "
    "traces.close(); print(time.monotonic() - began)"
)


def seconds_to_close(collector):
    done = subprocess.run(
        [sys.executable, "-c", SENDS],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": collector},
    )
    return float(done.stdout)


def test_spans_reach_the_collector_that_the_environment_names():
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        seconds_to_close(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    [(path, body)] = received
    body = gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body
    assert path == "/v1/traces"
    assert b"chat int4" in body


def test_a_collector_that_does_not_answer_keeps_no_server_from_ending():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert seconds_to_close(f"http://127.0.0.1:{port}") < 4
    assert seconds_to_close(f"http://127.0.0.1:{port}") < 4  # and one that is not there


def test_a_process_sends_its_spans_with_its_name_and_version():
    program = (
        "import os; from fastvlm_convert.serve.traces import *; from fastvlm_convert.serve.engine import *; "
        "traces = open_traces('1.2.3', os.environ); "
        "traces.answered(TracedAnswer('int4', 'req-1', Sampling(64), 0.1)); traces.close()"
    )
    environ = {"OTEL_TRACES_EXPORTER": "console", "OTEL_RESOURCE_ATTRIBUTES": "service.namespace=qa"}
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ
    ).stdout
    assert '"name": "chat int4"' in told
    assert '"service.name": "fastvlm-convert"' in told
    assert '"service.version": "1.2.3"' in told
    assert '"service.namespace": "qa"' in told
    renamed = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environ | {"OTEL_SERVICE_NAME": "mine"},
    ).stdout
    assert '"service.name": "mine"' in renamed
