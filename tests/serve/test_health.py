"""The window of five minutes with a fake clock, and the document at /health."""

from dataclasses import replace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_convert.serve.engine import EngineStatus
from fastvlm_convert.serve.health import (
    BundleState,
    HealthDocument,
    Recent,
    ServerState,
    Window,
    health_document,
    succeeded,
)


class Clock:
    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


def engine(**changes):
    values = {
        "is_ready": True, "slots": 2, "running": 0, "workers": {"ready": 1, "busy": 1, "restarting": 1},
        "restarts": 0, "executed_by": "onnxruntime 1.32.0", "cache_bytes": {}, "cache_lookups": {},
        "memory_bytes": 3 << 20,
    }  # fmt: skip
    return EngineStatus(**values | changes)


def bundle(name="int4", breaker_state="closed", **changes):
    return BundleState(name, "onnx", "ab" * 32, engine(**changes), breaker_state)


STATE = ServerState(
    version="1.2.3",
    bundles=(bundle(),),
    recent=Recent(),
    queue_length=0,
    queue_limit=64,
    expected_wait_s=0.0,
    security_enabled=True,
    incidents=0,
    scaling=None,
    answer_hits=0,
    answer_misses=0,
    memory_bytes=100 << 20,
    uptime_s=12.0,
)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (200, True),
        (304, True),
        (400, None),
        (404, None),
        (429, None),
        (499, None),
        (500, False),
        (503, False),
    ],
)
def test_only_what_the_server_does_counts(code, says):
    assert succeeded(code) is says


def test_an_empty_window_has_no_figures():
    window = Window(Clock())
    assert window.recent() == Recent(0, None, None, None, None, None)
    window.add(1.0, succeeded(422))
    assert window.recent() == Recent()


def test_percentiles_are_of_the_requests_that_succeeded():
    clock = Clock()
    window = Window(clock)
    for milliseconds in range(1, 101):
        window.add(milliseconds / 1000, True)
    for _ in range(25):
        window.add(0.0001, False)
    recent = window.recent()
    assert recent.requests == 125
    assert recent.success_rate_percent == pytest.approx(80)
    assert recent.average_ms == pytest.approx(50.5)
    assert recent.p50_ms == pytest.approx(50.5)
    assert recent.p95_ms == pytest.approx(95.05)
    assert recent.p99_ms == pytest.approx(99.01)


def test_failures_alone_have_a_rate_and_no_latency():
    window = Window(Clock())
    window.add(0.5, False)
    assert window.recent() == Recent(1, 0.0)


def test_five_minutes_later_a_request_is_forgotten():
    clock = Clock()
    window = Window(clock)
    window.add(1.0, False)
    clock.now = 299.9
    window.add(2.0, True)
    assert window.recent().success_rate_percent == 50
    clock.now = 300.0
    assert window.recent() == Recent(1, 100.0, 2000, 2000, 2000, 2000)
    clock.now = 599.9
    assert window.recent() == Recent()


def test_a_request_may_bring_the_time_that_it_ended():
    window = Window(Clock(1000.0))
    window.add(1.0, True, 699.0)
    window.add(1.0, True, 701.0)
    assert window.recent().requests == 1


@given(
    st.lists(st.tuples(st.floats(0, 40), st.floats(0, 10), st.sampled_from([True, False, None])), max_size=60)
)
def test_a_window_agrees_with_a_list_of_all_requests(events):
    clock = Clock()
    window = Window(clock, seconds=60, max_requests=20)
    all_of_them = []
    for pause, seconds, ok in events:
        clock.now += pause
        window.add(seconds, ok)
        if ok is not None:
            all_of_them.append((clock.now, seconds, ok))
    held = [(s, ok) for at, s, ok in all_of_them[-20:] if at > clock.now - 60]
    recent = window.recent()
    assert recent.requests == len(held)
    took = sorted(s for s, ok in held if ok)
    if took:
        assert recent.average_ms == pytest.approx(1000 * sum(took) / len(took))
        assert took[0] * 1000 <= recent.p50_ms <= recent.p95_ms <= recent.p99_ms <= took[-1] * 1000 + 1e-6
    else:
        assert recent.p50_ms is None


def test_memory_of_a_window_is_bounded():
    clock = Clock()
    window = Window(clock, max_requests=100)
    for number in range(1000):
        clock.now += 0.001
        window.add(number, True)
    assert window.recent().requests == 100
    assert window.recent().average_ms == pytest.approx(949.5e3)


def test_the_document_has_the_fields_that_are_documented():
    state = replace(
        STATE,
        recent=Recent(200, 99.5, 120.0004, 100.0, 180.0, 190.0),
        queue_length=3,
        expected_wait_s=0.75,
        incidents=2,
        scaling="adaptive",
        answer_hits=3,
        answer_misses=1,
    )
    assert health_document(state).model_dump(mode="json") == {
        "status": "healthy",
        "success_rate_percent": 99.5,
        "circuit_breaker_state": "closed",
        "average_latency_ms": 120.0,
        "security": {"enhanced_security": True, "total_incidents": 2, "status": "incidents"},
        "scaling": {"enabled": True, "workers": 2, "cache_hit_rate": 0.75, "auto_scaling": "adaptive"},
        "version": "1.2.3",
        "models": [
            {"id": "int4", "target": "onnx", "executed_by": "onnxruntime 1.32.0", "sha256": "ab" * 32}
        ],
        "queue": {"length": 3, "limit": 64, "expected_wait_ms": 750.0},
        "latency_ms": {"p50": 100.0, "p95": 180.0, "p99": 190.0},
        "memory_mb": 103.0,
        "uptime_s": 12.0,
    }


def test_what_is_not_known_is_null():
    document = health_document(replace(STATE, security_enabled=False)).model_dump()
    assert document["success_rate_percent"] is None
    assert document["average_latency_ms"] is None
    assert document["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    assert document["scaling"]["cache_hit_rate"] is None
    assert document["scaling"]["auto_scaling"] is None
    assert document["scaling"]["enabled"] is False
    assert document["security"] == {"enhanced_security": False, "total_incidents": 0, "status": "off"}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "healthy"),
        ({"is_draining": True}, "unhealthy"),
        ({"bundles": (bundle(is_ready=False),)}, "unhealthy"),
        ({"bundles": (bundle(breaker_state="open"),)}, "unhealthy"),
        ({"bundles": (bundle(breaker_state="half_open"),)}, "degraded"),
        ({"bundles": (bundle(), bundle("int8", is_ready=False))}, "degraded"),
        ({"bundles": (bundle(), bundle("int8", breaker_state="open"))}, "degraded"),
        ({"recent": Recent(10, 94.9)}, "degraded"),
        ({"recent": Recent(10, 95.0)}, "healthy"),
        ({"recent": Recent(9, 0.0)}, "healthy"),
        ({"recent": Recent(10, 50.0)}, "degraded"),
        ({"recent": Recent(10, 49.9)}, "unhealthy"),
        ({"queue_length": 51}, "healthy"),
        ({"queue_length": 52}, "degraded"),
        ({"queue_limit": 0}, "healthy"),
    ],
)
def test_the_status_follows_from_the_thresholds(changes, status):
    assert health_document(replace(STATE, **changes)).status == status


@pytest.mark.parametrize(
    ("states", "worst"),
    [
        (["closed", "half_open"], "half_open"),
        (["half_open", "open", "closed"], "open"),
        (["closed"], "closed"),
    ],
)
def test_the_breaker_that_is_shown_is_the_worst(states, worst):
    bundles = [bundle(str(number), state) for number, state in enumerate(states)]
    assert health_document(replace(STATE, bundles=bundles)).circuit_breaker_state == worst


def test_the_openapi_document_has_its_schema():
    app = FastAPI()

    @app.get("/health")
    def health() -> HealthDocument:
        return health_document(STATE)

    with TestClient(app) as client:
        assert client.get("/health").json()["queue"]["limit"] == 64
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert set(schemas["HealthDocument"]["required"]) == set(HealthDocument.model_fields)
    assert schemas["HealthDocument"]["properties"]["status"]["enum"] == ["healthy", "degraded", "unhealthy"]
    assert schemas["LatencyHealth"]["properties"]["p95"]["anyOf"][1] == {"type": "null"}
