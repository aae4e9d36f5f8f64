"""What a running server tells of itself: each metric moves when it should; health, logs and traces agree."""

import gzip
import io
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
import uvicorn
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from fastvlm_convert.serve.app import make_app
from fastvlm_convert.serve.engines.choice import make_engine
from fastvlm_convert.serve.logs import set_up_logs
from fastvlm_convert.serve.otel_traces import OtelTraces
from fastvlm_convert.serve.served_bundle import open_served_bundle
from fastvlm_convert.serve.server import listen, server_config
from fastvlm_convert.serve.service import make_service
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.serve.threats import rules
from tests.serve.pictures import data_url, noise, saved
from tests.serve.scripted_engine import ScriptedEngine

SECRET = "planted-7f3a"
PATH = "/v1/chat/completions"


class Running:
    """A server on a port of its own, and what is asked of it."""

    def __init__(self, service, port):
        self.service = service
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)

    def ask(self, text="What is this?", picture=None, headers=None, **fields):
        content = [{"type": "text", "text": text}]
        if picture is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 6} | fields
        return self.client.post(PATH, json=body, headers=headers)

    def metrics(self):
        """Values by (name without prefix, labels)."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return {
            (s.name.removeprefix("fastvlm_"), tuple(sorted(s.labels.items()))): s.value
            for family in families
            for s in family.samples
        }

    def value(self, name, **labels):
        return self.metrics()[name, tuple(sorted(labels.items()))]

    def requests(self):
        """How many ended, by (model, code, cache); without those that never did."""
        return {
            (labels[2][1], labels[1][1], labels[0][1]): number
            for (name, labels), number in self.metrics().items()
            if name == "requests_total" and number
        }

    def health(self):
        return self.client.get("/health").json()

    def until(self, holds):
        end = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.01)


@contextmanager
def served(bundle, make=make_engine, traces=None, **settings):
    service = make_service(Settings(**settings), [open_served_bundle(bundle, "tiny")], make)
    if traces is not None:
        service = replace(service, accounts=replace(service.accounts, traces=traces))
    server = uvicorn.Server(server_config(make_app(service)))
    sock = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        running = Running(service, sock.getsockname()[1])
        running.until(lambda: running.client.get("/readyz").status_code == 200)
        yield running
        running.client.close()
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def scripted(bundle, engine, **settings):
    with served(bundle, lambda *_: engine, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def picture():
    return data_url(saved(noise(), "PNG"), "image/png")


def test_answers_move_what_is_counted_of_them_by_their_cache(fp32_bundle, picture):
    with served(fp32_bundle) as server:
        first = server.ask("What is this?", picture).json()
        second = server.ask("What color is it?", picture).json()
        third = server.ask("What color is it?", picture).json()
        assert server.requests() == {
            ("tiny", "200", "miss"): 1,
            ("tiny", "200", "prefix"): 1,
            ("tiny", "200", "hit"): 1,
        }
        assert second["choices"] == third["choices"]
        computed = [first["usage"], second["usage"]]
        assert server.value("prompt_tokens_total", model="tiny") == sum(u["prompt_tokens"] for u in computed)
        assert server.value("answer_tokens_total", model="tiny") == sum(
            u["completion_tokens"] for u in computed
        )
        stages = {s: server.value("stage_seconds_count", model="tiny", stage=s) for s in ("vision", "decode")}
        assert stages == {"vision": 1, "decode": 2}
        assert server.value("stage_seconds_count", model="tiny", stage="prefill") == 2
        assert server.value("stage_seconds_sum", model="tiny", stage="vision") == pytest.approx(
            first["timings"]["vision_ms"] / 1000, abs=1e-4
        )
        assert server.value("request_duration_seconds_count", model="tiny") == 3
        assert server.value("queue_duration_seconds_count", model="tiny") == 2
        assert server.value("time_to_first_token_seconds_count", model="tiny") == 3
        assert server.value("cache_lookups_total", cache="answer", result="hit") == 1
        assert server.value("cache_lookups_total", cache="answer", result="miss") == 2
        assert server.value("cache_lookups_total", cache="prefix", result="hit") >= 1
        assert server.value("cache_lookups_total", cache="feature", result="miss") == 1
        for cache in ("answer", "feature", "prefix"):
            assert server.value("cache_bytes", cache=cache) > 0
        assert server.value("workers", model="tiny", state="ready") == 1
        health = server.health()
    assert health["status"] == "healthy"
    assert health["success_rate_percent"] == 100
    assert health["scaling"]["cache_hit_rate"] == pytest.approx(1 / 3)
    assert health["latency_ms"]["p50"] <= health["latency_ms"]["p99"]
    assert health["models"][0]["id"] == "tiny"
    assert health["models"][0]["executed_by"].startswith("onnxruntime")
    assert health["memory_mb"] > 10


def test_every_threat_rule_has_its_series_before_its_first_incident(fp32_bundle):
    with scripted(fp32_bundle, ScriptedEngine()) as server:
        labels = [dict(labels) for name, labels in server.metrics() if name == "incidents_total"]
    assert {label["rule"] for label in labels} == {rule.name for rule in rules()} | {"other"}
    assert {"record", "block"} <= {label["action"] for label in labels}


def test_before_the_first_request_nothing_is_said_of_requests(fp32_bundle):
    with scripted(fp32_bundle, ScriptedEngine()) as server:
        health = server.health()
        assert server.requests() == {}
    assert health["success_rate_percent"] is None
    assert health["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    assert health["scaling"]["cache_hit_rate"] is None


def test_a_stream_tells_the_time_between_tokens(fp32_bundle):
    engine = ScriptedEngine(step_s=0.02)
    with scripted(fp32_bundle, engine) as server:
        assert "[DONE]" in server.ask(stream=True).text
        server.until(lambda: server.requests() == {("tiny", "200", "miss"): 1})
        assert server.value("inter_token_seconds_count", model="tiny") == 2
        assert 0.03 < server.value("inter_token_seconds_sum", model="tiny") < 5
        assert server.value("time_to_first_token_seconds_sum", model="tiny") > 0.02


def test_what_clients_do_wrong_counts_and_is_no_failure(fp32_bundle):
    with scripted(fp32_bundle, ScriptedEngine()) as server:
        assert server.ask(model="another").status_code == 404
        assert server.ask(no_such_field=1).status_code == 400
        assert (
            server.client.post(PATH, content=b"x", headers={"content-type": "text/plain"}).status_code == 415
        )
        counted = server.requests()
        assert sum(counted.values()) == 3
        assert {code for _, code, _ in counted} == {"404", "400", "415"}
        assert {cache for _, _, cache in counted} == {"none"}
        assert ("other", "404", "none") in counted
        assert server.health()["success_rate_percent"] is None


def test_failures_open_the_breaker_and_everything_says_so(fp32_bundle):
    engine = ScriptedEngine(commands=["fail"] * 3)
    with scripted(fp32_bundle, engine, breaker_failures=3) as server:
        codes = [server.ask(str(number)).status_code for number in range(4)]
        assert codes == [500, 500, 500, 503]
        assert server.requests() == {("tiny", "500", "none"): 3, ("tiny", "503", "none"): 1}
        assert server.value("rejected_total", reason="breaker_open") == 1
        assert server.value("breaker_state", model="tiny", state="open") == 1
        assert server.value("breaker_state", model="tiny", state="closed") == 0
        health = server.health()
    assert health["circuit_breaker_state"] == "open"
    assert health["status"] == "unhealthy"
    assert health["success_rate_percent"] == 0


def test_a_stream_that_fails_midway_is_a_failure_although_it_began_with_200(fp32_bundle):
    with scripted(fp32_bundle, ScriptedEngine(commands=["fail_midway"])) as server:
        reply = server.ask(stream=True)
        assert reply.status_code == 200
        assert "[DONE]" not in reply.text
        server.until(lambda: server.requests() == {("tiny", "500", "none"): 1})
        assert server.health()["success_rate_percent"] == 0


def test_the_queue_is_seen_and_so_is_who_was_refused(fp32_bundle):
    engine = ScriptedEngine(commands=["hang"])
    settings = {"max_queue": 1, "timeout_seconds": 2.0}
    with scripted(fp32_bundle, engine, **settings) as server, ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.ask, "one")
        server.until(lambda: server.value("requests_running", model="tiny") == 1)
        waiting = pool.submit(server.ask, "two")
        server.until(lambda: server.value("requests_waiting", model="tiny") == 1)
        health = server.health()
        assert (health["queue"]["length"], health["queue"]["limit"]) == (1, 1)
        assert health["status"] == "degraded"
        assert server.ask("three").json()["error"]["code"] == "queue_full"
        assert server.value("rejected_total", reason="queue_full") == 1
        assert running.result().status_code == 504
        assert server.value("rejected_total", reason="deadline") >= 1
        waiting.result()
        server.until(lambda: server.value("requests_running", model="tiny") == 0)
        assert server.value("requests_waiting", model="tiny") == 0


def test_a_client_that_leaves_is_counted_once(fp32_bundle):
    engine = ScriptedEngine(step_s=0.05, pieces=("word ",) * 100)
    with scripted(fp32_bundle, engine) as server:
        body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
        with server.client.stream("POST", PATH, json=body) as reply:
            next(reply.iter_lines())
        server.until(lambda: server.value("cancelled_total") == 1)
        assert server.requests() == {("tiny", "499", "none"): 1}
        assert server.health()["success_rate_percent"] is None


def test_equal_questions_at_the_same_time_are_counted_as_shared(fp32_bundle):
    engine = ScriptedEngine(step_s=0.1)
    with scripted(fp32_bundle, engine) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask, "same")
        server.until(lambda: engine.running == 1)
        assert server.ask("same").status_code == first.result().status_code == 200
        assert server.value("deduplicated_total") == 1
        assert server.value("answer_tokens_total", model="tiny") == 4
        assert sum(server.requests().values()) == 2


class DyingEngine(ScriptedEngine):
    """One whose workers died before."""

    def status(self):
        return replace(
            super().status(), restarts=2, workers={"ready": 1, "restarting": 1}, memory_bytes=1 << 30
        )


def test_workers_are_told_by_their_engine(fp32_bundle):
    with scripted(fp32_bundle, DyingEngine(commands=["die"])) as server:
        assert server.ask().status_code == 503
        assert server.value("rejected_total", reason="worker_died") == 1
        assert server.value("worker_restarts_total", model="tiny") == 2
        assert server.value("workers", model="tiny", state="restarting") == 1
        assert server.health()["memory_mb"] > 1024


@pytest.fixture
def log():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    set_up_logs("json", stream)
    yield stream
    root.handlers, _ = before
    root.setLevel(before[1])
    logging.captureWarnings(False)


def test_each_request_is_one_line_without_anything_that_its_client_sent(fp32_bundle, picture, log):
    hostile = {"authorization": f"Bearer {SECRET}", "x-forwarded-for": SECRET}
    engine = ScriptedEngine(pieces=(SECRET,), commands=["answer", "bug"])
    with scripted(fp32_bundle, engine) as server:
        server.ask(f"About {SECRET}", picture, headers={**hostile, "x-request-id": "mine-1"})
        server.ask(f"Again {SECRET}", picture)
        server.ask(model=SECRET, user=SECRET)
        server.client.get(f"/v1/models/{SECRET}?key={SECRET}")
        server.client.get(f"/{SECRET}")
        for path in ("/livez", "/readyz", "/health", "/metrics"):
            server.client.get(path)
        exposed = server.client.get("/metrics").text + json.dumps(server.health())
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    access = [line for line in lines if line["message"] == "request"]
    assert [(line["route"], line["code"]) for line in access] == [
        (PATH, 200),
        (PATH, 500),
        (PATH, 404),
        ("/v1/models/{name:path}", 404),
        ("other", 404),
    ]
    assert access[0]["request_id"] == "mine-1"
    assert access[0]["model"] == "tiny"
    assert access[0]["answer_tokens"] == 2
    assert access[1]["error"] == "internal"
    assert len({line["client"] for line in access}) == 1
    assert any("IndexError at" in line.get("exception", "") for line in lines)
    assert SECRET not in log.getvalue()
    assert "127.0.0.1" not in "".join(json.dumps(line) for line in access)
    assert picture[30:60] not in log.getvalue()
    assert SECRET not in exposed


def test_fastapi_sends_nothing_of_its_own(fp32_bundle, monkeypatch):
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            is_packed = self.headers.get("content-encoding") == "gzip"
            received.append((self.path, gzip.decompress(body) if is_packed else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
        monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "10")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "10")
        with scripted(fp32_bundle, ScriptedEngine(commands=["answer", "bug"])) as server:
            server.ask(f"About {SECRET}")
            server.ask(SECRET)
            server.client.post(PATH, json={"messages": SECRET})
        collector.shutdown()
        thread.join()
    assert {path for path, _ in received} == {"/v1/traces"}
    sent = b"".join(body for _, body in received)
    assert sent.count(b"POST /v1/chat/completions") == 3
    assert SECRET.encode() not in sent


def test_the_answer_is_a_span_below_its_request_below_its_caller(fp32_bundle, picture):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    caller = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with served(fp32_bundle, traces=OtelTraces(provider, "1")) as server:
        server.ask(f"About {SECRET}", picture, headers=caller)
        server.ask(f"About {SECRET}", picture, headers=caller, stream=True)
        server.until(lambda: sum(server.requests().values()) == 2)
        server.client.get("/health")
    spans = exporter.get_finished_spans()
    requests = {span.context.span_id for span in spans if span.name == f"POST {PATH}"}
    answers = [span for span in spans if span.name == "chat tiny"]
    assert len(requests) == len(answers) == 2
    assert {span.parent.span_id for span in answers} == requests
    assert [span.attributes["fastvlm.cache"] for span in answers] == ["miss", "hit"]
    assert {f"{span.context.trace_id:032x}" for span in spans} == {"0af7651916cd43dd8448eb211c80319c"}
    stages = {span.name for span in spans if span.parent.span_id == answers[0].context.span_id}
    assert {"vision", "prefill", "decode"} <= stages
    assert SECRET not in "".join(span.to_json() for span in spans)
