"""Alerting rules: promtool accepts them, its unit tests pass, and fail as soon as a rule is spoiled."""

from pathlib import Path

import pytest
import yaml

from tests.deploy.metric_names import faults, served
from tests.deploy.promtool import needs_promtool, promtool

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCUMENT = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))
RULES = {rule["alert"]: rule for group in DOCUMENT["groups"] for rule in group["rules"]}
TESTS = yaml.safe_load((DEPLOY / "alerts_test.yaml").read_text(encoding="utf-8"))["tests"]


def test_every_subject_has_an_alert():
    assert set(RULES) == {
        "FastvlmTargetDown",
        "FastvlmLatencyHigh",
        "FastvlmErrorsHigh",
        "FastvlmBreakerOpen",
        "FastvlmQueueNearLimit",
        "FastvlmRejecting",
        "FastvlmCacheHitRateLow",
        "FastvlmWorkersRestarting",
        "FastvlmMemoryHigh",
    }


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_an_alert_asks_for_what_the_server_has_and_says_what_to_do(rule):
    assert faults(rule["expr"], served()) == []
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert {"summary", "description"} == set(rule["annotations"])


def test_a_wrong_name_label_or_value_is_noticed():
    known = served()
    assert faults("rate(fastvlm_request_total[5m])", known) == ["fastvlm_request_total"]
    assert faults('fastvlm_breaker_state{state="opened"}', known) == ["fastvlm_breaker_state{state=opened}"]
    assert faults('fastvlm_breaker_state{breaker="open"}', known) == ["fastvlm_breaker_state{breaker=open}"]
    assert faults('fastvlm_requests_total{code=~"5..",instance="a"}', known) == []


@pytest.mark.parametrize("alert", RULES)
def test_each_alert_is_tested_to_fire_and_to_stay_quiet(alert):
    expected = [
        bool(case["exp_alerts"])
        for test in TESTS
        for case in test["alert_rule_test"]
        if case["alertname"] == alert
    ]
    assert set(expected) == {True, False}


@needs_promtool
def test_promtool_accepts_the_rules_and_their_tests_pass():
    code, said = promtool("check", "rules", str(DEPLOY / "alerts.yaml"))
    assert code == 0, said
    assert f"{len(RULES)} rules found" in said
    code, said = promtool("test", "rules", str(DEPLOY / "alerts_test.yaml"))
    assert code == 0, said


@needs_promtool
@pytest.mark.parametrize("expr", ["vector(0) > 1", "vector(1)"], ids=["never", "always"])
@pytest.mark.parametrize("alert", RULES)
def test_the_unit_tests_notice_a_rule_that_never_or_always_fires(tmp_path, alert, expr):
    groups = [
        {**group, "rules": [r | {"expr": expr} if r["alert"] == alert else r for r in group["rules"]]}
        for group in DOCUMENT["groups"]
    ]
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
    own = [test for test in TESTS if any(case["alertname"] == alert for case in test["alert_rule_test"])]
    tests = {"rule_files": ["alerts.yaml"], "evaluation_interval": "15s", "tests": own}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    code, said = promtool("test", "rules", "tests.yaml", folder=tmp_path)
    assert code == 1, said
    assert f"alertname: {alert}" in said or f"alertname:{alert}" in said.replace(" ", "")
