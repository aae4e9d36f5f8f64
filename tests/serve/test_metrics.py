"""The exposition: parsed by Prometheus' own parser, names and labels exactly, every series from the start."""

import itertools
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastvlm_convert.serve.engine import EngineStatus, StageTimings
from fastvlm_convert.serve.metrics import BUCKETS, Metrics

FAMILIES = {  # the names that docs and alerts use; (type, labels)
    "requests_total": ("counter", {"model", "code", "cache"}),
    "request_duration_seconds": ("histogram", {"model"}),
    "queue_duration_seconds": ("histogram", {"model"}),
    "time_to_first_token_seconds": ("histogram", {"model"}),
    "inter_token_seconds": ("histogram", {"model"}),
    "stage_seconds": ("histogram", {"model", "stage"}),
    "prompt_tokens_total": ("counter", {"model"}),
    "answer_tokens_total": ("counter", {"model"}),
    "requests_running": ("gauge", {"model"}),
    "requests_waiting": ("gauge", {"model"}),
    "rejected_total": ("counter", {"reason"}),
    "cancelled_total": ("counter", set()),
    "cache_lookups_total": ("counter", {"cache", "result"}),
    "cache_bytes": ("gauge", {"cache"}),
    "deduplicated_total": ("counter", set()),
    "escalations_total": ("counter", {"model", "outcome"}),
    "breaker_state": ("gauge", {"model", "state"}),
    "incidents_total": ("counter", {"rule", "action"}),
    "workers": ("gauge", {"model", "state"}),
    "worker_restarts_total": ("counter", {"model"}),
    "scaling_decisions_total": ("counter", {"direction", "reason"}),
    "build_info": ("gauge", {"version"}),
}


def scraped(metrics):
    """Values by (name, labels)."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(metrics, name, **labels):
    return scraped(metrics)[f"fastvlm_{name}", tuple(sorted(labels.items()))]


def moved(metrics, act):
    """What an act changes: the difference by (name without prefix, label values in order of their names)."""
    before = scraped(metrics)
    act()
    after = scraped(metrics)
    return {
        (name.removeprefix("fastvlm_"), *(v for _, v in labels)): number - before.get((name, labels), 0)
        for (name, labels), number in after.items()
        if name.startswith("fastvlm_") and number != before.get((name, labels), 0) and "_bucket" not in name
    }


@pytest.fixture
def metrics():
    return Metrics("1.2.3", ["int4", "int8"], ["path_traversal"])


def status(**changes):
    values = {
        "is_ready": True, "slots": 2, "running": 1, "workers": {"ready": 1, "busy": 2}, "restarts": 3,
        "executed_by": "onnxruntime 1.32.0", "cache_bytes": {"feature": 100, "prefix": 7},
        "cache_lookups": {("feature", "hit"): 5, ("feature", "miss"): 2, ("prefix", "miss"): 1},
    }  # fmt: skip
    return EngineStatus(**values | changes)


def test_names_types_and_labels_are_those_that_are_documented(metrics):
    families = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        if family.name.startswith("fastvlm_"):
            total = "_total" if family.type == "counter" else ""
            labels = {name for sample in family.samples for name in sample.labels} - {"le"}
            families[family.name.removeprefix("fastvlm_") + total] = (family.type, labels)
    assert families == FAMILIES


def test_every_series_is_there_from_the_start_at_zero(metrics):
    ours = {key: number for key, number in scraped(metrics).items() if key[0].startswith("fastvlm_")}
    assert {key[0] for key, number in ours.items() if number} == {
        "fastvlm_build_info",
        "fastvlm_breaker_state",  # closed
    }
    counters = [key for key in ours if key[0].endswith("_total")]
    before = set(ours)
    for model in ("int4", "int8"):
        metrics.request_finished(model, 200, "miss", 1.0)
        metrics.request_finished(model, 504, None, 1.0)
        metrics.queued(model, 0.1)
        metrics.first_token(model, 0.1)
        metrics.inter_token(model, 0.1)
        metrics.stages(model, StageTimings(1, 1, 1, 1))
        metrics.tokens(model, 1, 1)
        metrics.set_status(model, status(), 1, "open")
    metrics.request_finished(None, 401, None, 0.1)
    metrics.rejected("queue_full")
    metrics.cache_lookup("answer", "hit")
    metrics.incident("path_traversal", "record")
    metrics.scaling_decision("up", "cpu")
    after = {key for key in scraped(metrics) if key[0].startswith("fastvlm_")}
    assert after == before
    assert len(counters) > 50


def test_a_request_moves_its_own_series_only(metrics):
    assert moved(metrics, lambda: metrics.request_finished("int4", 200, "feature", 0.25)) == {
        ("requests_total", "feature", "200", "int4"): 1,
        ("request_duration_seconds_count", "int4"): 1,
        ("request_duration_seconds_sum", "int4"): 0.25,
    }
    assert moved(metrics, lambda: metrics.request_finished("int8", 503, None, 0.5)) == {
        ("requests_total", "none", "503", "int8"): 1,
        ("request_duration_seconds_count", "int8"): 1,
        ("request_duration_seconds_sum", "int8"): 0.5,
    }


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("queue_duration_seconds", Metrics.queued),
        ("time_to_first_token_seconds", Metrics.first_token),
        ("inter_token_seconds", Metrics.inter_token),
    ],
)
def test_durations_fall_into_the_bucket_that_holds_them(metrics, name, record):
    record(metrics, "int4", 0.003)
    record(metrics, "int4", 400.0)
    assert value(metrics, f"{name}_bucket", model="int4", le="0.0025") == 0
    assert value(metrics, f"{name}_bucket", model="int4", le="0.005") == 1
    assert value(metrics, f"{name}_bucket", model="int4", le="300.0") == 1
    assert value(metrics, f"{name}_bucket", model="int4", le="+Inf") == 2
    assert value(metrics, f"{name}_count", model="int8") == 0


def test_buckets_reach_from_a_millisecond_to_five_minutes():
    assert BUCKETS[0] == 0.001
    assert BUCKETS[-1] == 300
    assert all(1.5 < large / small <= 3 for small, large in itertools.pairwise(BUCKETS))


def test_stages_are_seconds_and_one_that_did_not_run_is_not_counted(metrics):
    change = moved(metrics, lambda: metrics.stages("int4", StageTimings(9, 0, 250, 500)))
    assert change == {
        ("stage_seconds_count", "int4", "prefill"): 1,
        ("stage_seconds_sum", "int4", "prefill"): 0.25,
        ("stage_seconds_count", "int4", "decode"): 1,
        ("stage_seconds_sum", "int4", "decode"): 0.5,
    }


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (
            lambda m: m.tokens("int8", 48, 12),
            {("prompt_tokens_total", "int8"): 48, ("answer_tokens_total", "int8"): 12},
        ),
        (lambda m: m.rejected("expected_wait"), {("rejected_total", "expected_wait"): 1}),
        (lambda m: m.rejected("rate_limited"), {("rejected_total", "rate_limited"): 1}),
        (lambda m: m.cancelled(), {("cancelled_total",): 1}),
        (lambda m: m.deduplicated(), {("deduplicated_total",): 1}),
        (lambda m: m.escalated("int8", "kept"), {("escalations_total", "int8", "kept"): 1}),
        (lambda m: m.cache_lookup("answer", "miss"), {("cache_lookups_total", "answer", "miss"): 1}),
        (lambda m: m.set_cache_bytes("answer", 4096), {("cache_bytes", "answer"): 4096}),
        (
            lambda m: m.incident("path_traversal", "block"),
            {("incidents_total", "block", "path_traversal"): 1},
        ),
        (lambda m: m.scaling_decision("down", "idle"), {("scaling_decisions_total", "down", "idle"): 1}),
    ],
)  # fmt: skip
def test_each_event_moves_its_counter(metrics, act, expected):
    assert moved(metrics, lambda: act(metrics)) == expected


def test_what_engines_count_is_read_when_scraped(metrics):
    metrics.cache_lookup("answer", "hit")
    metrics.set_status("int4", status(), 4, "half_open")
    metrics.set_status("int8", status(restarts=1, cache_bytes={"feature": 1}), 0, "closed")
    assert value(metrics, "requests_running", model="int4") == 1
    assert value(metrics, "requests_waiting", model="int4") == 4
    assert value(metrics, "worker_restarts_total", model="int4") == 3
    assert value(metrics, "worker_restarts_total", model="int8") == 1
    assert value(metrics, "workers", model="int4", state="busy") == 2
    assert value(metrics, "workers", model="int4", state="stopping") == 0
    assert [
        value(metrics, "breaker_state", model="int4", state=s) for s in ("closed", "open", "half_open")
    ] == [0, 0, 1]
    assert value(metrics, "cache_bytes", cache="feature") == 101
    assert value(metrics, "cache_lookups_total", cache="feature", result="hit") == 10
    assert value(metrics, "cache_lookups_total", cache="answer", result="hit") == 1
    metrics.set_status("int4", status(restarts=4, running=0), 0, "closed")
    assert value(metrics, "worker_restarts_total", model="int4") == 4
    assert value(metrics, "breaker_state", model="int4", state="half_open") == 0


def test_what_clients_send_never_becomes_a_label(metrics):
    before = len(scraped(metrics))
    for number in range(300):
        name = f"no-such-model-{number}"
        metrics.request_finished(name, 404, None, 0.001)
        metrics.set_status(name, status(), 1, "open")
        metrics.rejected(f"reason {number}")
        metrics.incident(f"rule {number}", f"action {number}")
        metrics.scaling_decision("up", f"because {number}")
        metrics.cache_lookup(f"cache {number}", "hit")
        metrics.set_cache_bytes(f"cache {number}", 1)
    assert len(scraped(metrics)) == before
    assert b"no-such" not in metrics.render()
    assert value(metrics, "requests_total", model="other", code="404", cache="none") == 300
    assert value(metrics, "rejected_total", reason="other") == 300
    assert value(metrics, "incidents_total", rule="other", action="other") == 300


def test_a_name_of_a_bundle_is_escaped():
    metrics = Metrics("1", ['a "quoted"\nname\\é'])
    metrics.request_finished('a "quoted"\nname\\é', 200, "miss", 1.0)
    assert value(metrics, "requests_total", model='a "quoted"\nname\\é', code="200", cache="miss") == 1


def test_the_process_is_measured_and_two_servers_share_nothing(metrics):
    assert scraped(metrics)["process_resident_memory_bytes", ()] > 1e6
    assert ("process_cpu_seconds_total", ()) in scraped(metrics)
    Metrics("1.2.3", ["int4"]).cancelled()
    assert value(metrics, "cancelled_total") == 0
    assert value(metrics, "build_info", version="1.2.3") == 1
    assert metrics.content_type.startswith("text/plain")


def test_threads_lose_no_event(metrics):
    def events():
        for _ in range(2000):
            metrics.cache_lookup("answer", "hit")
            metrics.inter_token("int4", 0.01)

    threads = [threading.Thread(target=events) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "cache_lookups_total", cache="answer", result="hit") == 8000
    assert value(metrics, "inter_token_seconds_count", model="int4") == 8000
