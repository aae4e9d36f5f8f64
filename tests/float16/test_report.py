import json

import pytest

from fastvlm_convert.float16.report import OpRange, RangeReport, load_report, save_report
from fastvlm_convert.user_cache import cache_folder

REPORT = RangeReport(
    "ab12",
    3,
    (OpRange("stem_0", 1.5, 0.0), OpRange("l0_residual", 60_000.0, 0.25), OpRange("l1_down", 40_000.0, 0.0)),
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path))


def test_a_report_is_kept_under_the_checkpoints_hash():
    path = save_report(REPORT)
    assert path.is_relative_to(cache_folder())
    assert load_report("ab12") == REPORT
    assert load_report("cd34") is None
    assert [p.name for p in path.parent.iterdir()] == ["ab12.json"]


def test_less_than_twofold_headroom_is_risky_worst_first():
    assert [o.op for o in REPORT.risky()] == ["l0_residual", "l1_down"]
    assert REPORT.ops[1].headroom == pytest.approx(65504 / 60_000)
    assert OpRange("zeros", 0.0, 0.0).headroom == float("inf")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', "\xff"])
def test_a_cache_that_cannot_be_read_is_no_cache(content):
    save_report(REPORT).write_text(content, encoding="latin-1")
    assert load_report("ab12") is None


def test_another_version_or_another_checkpoint_is_no_cache():
    path = save_report(REPORT)
    value = json.loads(path.read_text())
    for change in ({"version": 1}, {"checkpoint_sha256": "cd34"}):
        path.write_text(json.dumps(value | change))
        assert load_report("ab12") is None
