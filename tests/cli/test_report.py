"""`report` on the command line."""

import json

from tests.bundles import copy_bundle


def test_it_writes_a_page_and_says_what_is_missing(cli, fp32_bundle, tmp_path):
    page = tmp_path / "report.html"
    result = cli("report", fp32_bundle, "-o", page)
    assert result.code == 0
    assert result.out.splitlines()[0] == "not_run  fp32 has not been verified"
    assert f"wrote {page}" in result.out
    assert "fastvlm-convert verify fp32 --reference CHECKPOINT --record" in result.err
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_its_document(cli, fp32_bundle, tmp_path):
    page = tmp_path / "report.html"
    document = cli("report", fp32_bundle, "-o", page, "--json").document
    assert (document["command"], document["status"], document["verdict"]) == ("report", "passed", "not_run")
    assert (document["output"], document["size"]) == (str(page), page.stat().st_size)
    assert {s["id"]: s["status"] for s in document["sections"]}["sizes"] == "shown"
    assert cli("report", fp32_bundle, "-o", page, "--overwrite", "-q").out == f"{page}\n"


def test_a_measurement_is_on_the_page(cli, fp32_bundle, tmp_path):
    bench = tmp_path / "bench.json"
    bench.write_text(cli("bench", fp32_bundle, "--trials", 2, "--new-tokens", 2, "--json").out)
    page = tmp_path / "report.html"
    document = cli("report", fp32_bundle, "--bench", bench, "-o", page, "--json").document
    assert {s["id"]: s["status"] for s in document["sections"]}["latency"] == "shown"
    assert "2 trials of 2 tokens" in page.read_text()
    assert "Decoding, tokens/s" in page.read_text()


def test_what_cannot_be_read_is_refused_before_anything_is_written(cli, fp32_bundle, tmp_path):
    page = tmp_path / "report.html"
    other = tmp_path / "other.json"
    for content, message in (
        ("{", "not valid JSON"),
        ('{"command": "plan", "schema_version": 1}', "not a document of `fastvlm-convert bench`"),
        ('{"command": "bench", "schema_version": 99}', "version 99; this tool reads 1"),
        (
            '{"command": "bench", "schema_version": 1, "contenders": 3}',
            "contenders is 3, expected a list of objects",
        ),
    ):
        other.write_text(content)
        result = cli("report", fp32_bundle, "--bench", other, "-o", page)
        assert (result.code, message in result.err, page.exists()) == (2, True, False), result.err
        assert "hint: write it with: fastvlm-convert bench ... --json > bench.json" in result.err
    missing = cli("report", fp32_bundle, "--bench", tmp_path / "none.json", "-o", page)
    assert (missing.code, "there is no such file" in missing.err) == (2, True)
    assert cli("report", fp32_bundle, "--images", tmp_path / "none", "-o", page).code == 2


def test_figures_of_a_document_are_numbers(cli, fp32_bundle, tmp_path):
    bench = tmp_path / "bench.json"
    bench.write_text(cli("bench", fp32_bundle, "--trials", 1, "--new-tokens", 2, "--json").out)
    document = json.loads(bench.read_text())
    document["contenders"][0]["metrics"]["ttft_ms"]["p50"] = "fast"
    bench.write_text(json.dumps(document))
    result = cli("report", fp32_bundle, "--bench", bench, "-o", tmp_path / "r.html")
    assert "contenders[0].metrics.ttft_ms.p50 is 'fast', expected a number" in result.err


def test_a_record_of_another_bundle_is_refused(cli, fp32_bundle, tmp_path):
    bundle = copy_bundle(fp32_bundle, tmp_path)
    (bundle / "verification.json").write_text(json.dumps({"schema": "fastvlm-convert/verification"}))
    result = cli("report", bundle, "-o", tmp_path / "r.html")
    assert result.code == 2
    assert "verify the bundle again with --record" in result.err


def test_a_page_is_no_part_of_a_bundle(cli, fp32_bundle):
    result = cli("report", fp32_bundle, "-o", fp32_bundle / "report.html")
    assert (result.code, (fp32_bundle / "report.html").exists()) == (2, False)
