"""`fastvlm-convert estimate`: what people and programs are told, and that it is always called an estimate."""

import json
import shutil
import sys

import pytest
import yaml

from fastvlm_convert.estimate.ceilings import LABEL, ceiling, estimate
from fastvlm_convert.estimate.phones import shipped_phones
from fastvlm_convert.estimate.workload import TargetWork, Work
from fastvlm_convert.pipeline import export
from tests.bundles import copy_bundle, edit_manifest
from tests.cli.conftest import CHECKPOINT
from tests.estimate.test_phones import FACT, PEAK, ROW, written


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """All three targets."""
    output = tmp_path_factory.mktemp("estimate") / "bundle"
    export(CHECKPOINT, output, recipe="fp16", targets=["onnx", "coreml", "mlx"])
    return output


def test_what_people_see(cli, bundle):
    result = cli("estimate", bundle)
    assert result.code == 0
    assert result.out.splitlines()[0] == LABEL
    assert LABEL.startswith("an estimate, not a measurement")
    for target in ("onnx", "coreml", "mlx"):
        assert sum(line.split()[:1] == [target] for line in result.out.splitlines()) == 2
    lines = [line for line in result.out.splitlines() if line.startswith("iPhone 15 Pro ")]
    assert len(lines) == 3
    assert all("<=" in line and ">=" in line and "limit unknown" in line for line in lines)
    assert sum(line.startswith("iQOO 15 ") for line in result.out.splitlines()) == 1  # Android: ONNX alone
    assert "Left out: heat" in result.err


def test_the_document(cli, bundle):
    result = cli("estimate", bundle, "--json")
    document = result.document
    assert (result.err, document["command"], document["status"], document["label"]) == (
        "", "estimate", "passed", LABEL,
    )  # fmt: skip
    assert [work["target"] for work in document["targets"]] == ["onnx", "coreml", "mlx"]
    work = document["targets"][0]
    found = next(
        c for c in document["ceilings"] if (c["phone"], c["target"]) == ("iPhone 15 Pro", "onnx")
    )  # fmt: skip
    token = work["decode_after_picture"]
    read = token["weight_bytes"] + token["row_bytes"] + token["cache_bytes"]
    assert found["decode_after_picture"] == pytest.approx(51.2e9 / read)
    assert found["decode_at_context"] < found["decode_after_picture"]
    assert found["unknown"] == ["an app's memory limit"]
    assert found["fits"] is None
    (first,) = found["first_token"]
    seconds = 0.0
    for step in (work["vision"], work["prefill"]):
        read = step["weight_bytes"] + step["row_bytes"] + step["cache_bytes"]
        seconds += max(2 * step["macs"] / 35e12, read / 51.2e9)
    assert first["seconds"] == pytest.approx(seconds)
    phone = next(p for p in document["phones"] if p["name"] == "iPhone 15 Pro")
    assert phone["bandwidth_gb_per_s"]["basis"] == "derived"
    assert phone["app_limit_gb"] == "unknown"
    assert any("caches of some chips" in note for note in document["notes"])


def test_the_same_bytes_every_time(cli, bundle, tmp_path):
    other = copy_bundle(bundle, tmp_path)
    first, second = (cli("estimate", b, "--json").document for b in (bundle, other))
    assert json.dumps(first) == json.dumps(second)


def test_ones_own_phones(cli, bundle, tmp_path):
    rows = [
        {**ROW, "name": "Small", "ram_gb": {**FACT, "value": 1}, "app_limit_gb": {**FACT, "value": 0.001}},
        {**ROW, "name": "Large", "app_limit_gb": {**FACT, "value": 2}},
        {**ROW, "name": "iQOO 15", "os": "ios"},
    ]
    result = cli("estimate", bundle, "--phones", written(tmp_path, {"phones": rows}))
    lines = {line.split("  ")[0]: line for line in result.out.splitlines()}
    assert "more than 1.0 MB" in lines["Small"]
    assert "of 2.0 GB" in lines["Large"]
    assert "(gpu)" in lines["Large"]
    assert sum(line.startswith("iQOO 15 ") for line in result.out.splitlines()) == 3  # replaced: iOS now


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("phones: [1]", "error: phones[0] is 1, expected settings"),
        (yaml.safe_dump({"phones": [{**ROW, "peaks": [{**PEAK, "unit": "dsp"}]}]}), "peaks[0].unit is 'dsp'"),
        (yaml.safe_dump({"phones": [{**ROW, "ram_gb": {**FACT, "value": 0}}]}), "ram_gb.value is 0.0"),
    ],
)
def test_a_bad_table_is_an_error_with_its_place(cli, bundle, tmp_path, content, expected):
    path = written(tmp_path, content)
    result = cli("estimate", bundle, "--phones", path)
    assert (result.code, result.out) == (2, "")
    assert expected in result.err
    assert str(path) in result.err
    assert "hint: " in result.err
    assert cli("estimate", bundle, "--phones", path, "--json").document["error"]["code"] == "phones"


def test_bundles_that_are_none(cli, bundle, tmp_path):
    assert "there is no such bundle" in cli("estimate", tmp_path / "none").err
    broken = copy_bundle(bundle, tmp_path)
    graph = next((broken / "onnx").glob("decoder*.onnx"))
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    result = cli("estimate", broken)
    assert result.code == 2
    assert "the graph is no valid protobuf" in result.err


def test_a_manifest_that_lies_is_refused(cli, bundle, tmp_path):
    broken = copy_bundle(bundle, tmp_path)

    def change(value):
        decoder = next(a for a in value["artifacts"] if (a["target"], a["component"]) == ("onnx", "decoder"))
        decoder["inputs"][-1]["dtype"] = "float8"

    edit_manifest(broken, change)
    result = cli("estimate", broken)
    assert result.code == 2
    assert "float8" in result.err


def test_a_file_cut_short_is_refused(cli, bundle, tmp_path):
    broken = copy_bundle(bundle, tmp_path)
    shutil.rmtree(broken / "coreml")
    result = cli("estimate", broken)
    assert result.code == 2
    assert "is missing" in result.err


def test_a_target_that_cannot_be_read_here_is_not_run(cli, bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "fastvlm_convert.estimate.onnx_work")
    document = cli("estimate", bundle, "--json").document
    assert [work["target"] for work in document["targets"]] == ["coreml", "mlx"]
    (missing,) = document["not_run"]
    assert (missing["target"], missing["status"]) == ("onnx", "not_run")
    assert "needs onnx, which is not installed" in missing["reason"]
    assert "onnx not run: an estimate of the onnx target needs onnx" in cli("estimate", bundle).err


def test_quiet_leaves_the_explanation_out(cli, bundle):
    result = cli("estimate", bundle, "--quiet")
    assert "Left out" not in result.err
    assert LABEL in result.out  # but never what it is


def test_no_phone_is_an_error(bundle):
    with pytest.raises(Exception, match="there is no phone"):
        estimate(bundle, ())


def test_what_a_slow_unit_takes_and_what_is_unknown():
    """By hand, where memory is what takes longer, and where nobody publishes anything."""
    heavy = Work(macs=10**10, weight_bytes=10**8)
    light = Work(macs=10**6, weight_bytes=5 * 10**9)
    work = TargetWork("onnx", 256, 2048, heavy, light, light, light, 10**9, 10**6)
    phone = shipped_phones()[0]
    assert ceiling(phone, work).decode_after_picture is None
    assert ceiling(phone, work).unknown == ("memory bandwidth", "an app's memory limit", "peak operations")
    (mine,) = (p for p in shipped_phones() if p.name == "iPhone 15 Pro")
    found = ceiling(mine, work)
    assert found.decode_after_picture == pytest.approx(51.2 / 5)
    assert found.first_token[0].seconds == pytest.approx(0.1 / 51.2 + 5 / 51.2)
    assert found.first_token_memory_s == pytest.approx(5.1 / 51.2)
    assert found.memory_bytes == 10**9 + 10**6
