"""Figures of phones on the page of `bench`: nothing here is timed."""

import json
import shutil
from pathlib import Path

import pytest

from fastvlm_convert.bench.result import METRICS

DATA = Path(__file__).parent.parent / "data" / "bench"
XCODE, PERF_TEST = DATA / "vision.mlperf", DATA / "perf_test.csv"
PIXEL = ("--measured-on", "Pixel 9, Android 15")


def latency(path: Path, name: str = "app", **changes) -> Path:
    """A file in our own format."""
    value = {
        "schema": "fastvlm-convert/latency",
        "schema_version": 1,
        "name": name,
        "measured_on": "Pixel 9, Android 15",
        "executed_by": "onnxruntime 1.22, 4 threads",
        "samples": {"ttft_ms": [500, 510, 505.5], "decode_ms": [20, 25, 40]},
        "load_ms": 900,
        "warmup": {"ttft_ms": 1200},
        **changes,
    }
    path.write_text(json.dumps({key: inner for key, inner in value.items() if inner is not None}))
    return path


def contenders(result):
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert (document["command"], document["status"]) == ("bench", "passed")
    assert (document["schema"], document["machine"], document["settings"]) == (
        "fastvlm-convert/bench",
        None,
        None,
    )
    return document["contenders"]


def test_our_own_format(cli, tmp_path):
    (found,) = contenders(cli("bench", "--import", latency(tmp_path / "a.json"), "--json"))
    assert (found["name"], found["measured_on"]) == ("app", "Pixel 9, Android 15")
    assert found["executed_by"] == "onnxruntime 1.22, 4 threads"
    assert found["imported_from"] == "fastvlm-convert/latency"
    assert found["load_ms"] == 900
    assert found["warmup"] == {"ttft_ms": 1200}
    assert found["samples"]["ttft_ms"] == [500, 510, 505.5]
    assert found["metrics"]["ttft_ms"] == {
        "p50": 505.5, "p90": pytest.approx(509.1), "p99": None, "min": 500, "max": 510,
    }  # fmt: skip
    assert found["samples"]["decode_tokens_per_s"] == [50, 40, 25]  # the rate of each answer
    assert found["metrics"]["decode_tokens_per_s"]["p90"] == pytest.approx(28)  # 90 % are at least as fast
    assert found["energy_not_run"] == "the file does not tell it"


def test_every_metric_of_ours_can_be_given(cli, tmp_path):
    given = {metric: [1.5] * 100 for metric in METRICS if metric.endswith("_ms")} | {"energy_j": [2.0]}
    (found,) = contenders(cli("bench", "--import", latency(tmp_path / "a", samples=given), "--json"))
    assert set(found["metrics"]) == {*given, "decode_tokens_per_s"}
    assert found["metrics"]["vision_ms"]["p99"] == 1.5
    assert found["energy_not_run"] is None


@pytest.mark.parametrize("inside", [False, True])
def test_xcode_s_report(cli, inside):
    """The folder, as Xcode exports it, and the file in it."""
    path = XCODE / "report.json" if inside else XCODE
    (found,) = contenders(cli("bench", "--import", f"vision={path}", "--json"))
    assert found["measured_on"] == "iPhone 16, iOS 26.1"
    assert found["executed_by"] == "Core ML (CPU and Neural Engine)"
    assert found["metrics"]["vision_ms"]["p50"] == pytest.approx(32)  # the report has seconds
    assert found["load_ms"] == pytest.approx(500)
    assert set(found["metrics"]) == {"vision_ms"}


def test_what_names_the_owner_of_a_phone_is_left_out(cli, tmp_path):
    saved = tmp_path / "saved.json"
    result = cli("bench", "--import", XCODE, "--json", "--save-baseline", saved)
    for text in (result.out, saved.read_text(), cli("bench", "--import", XCODE).out):
        for secret in ("Jo's phone", "C0FFEE123456", "00008140"):
            assert secret not in text


def test_onnxruntime_perf_test(cli):
    (found,) = contenders(cli("bench", "--import", f"decode={PERF_TEST}", *PIXEL, "--json"))
    assert found["measured_on"] == "Pixel 9, Android 15"
    assert found["samples"]["decode_ms"] == pytest.approx([12.5, 12.0, 13.0, 12.4])
    assert found["metrics"]["decode_tokens_per_s"]["p50"] == pytest.approx(80.3, abs=0.1)
    assert found["peak_memory_bytes"] == 104857600
    assert found["imported_from"] == "onnxruntime_perf_test"


@pytest.mark.parametrize(
    "tail",
    ["", "\nMin Latency is 0.012sec\nMax Latency is 0.013sec\nP50 Latency is 0.0125sec\n"],
    ids=["no_statistics", "of_an_older_release"],
)
def test_onnxruntime_perf_test_of_other_releases(cli, tmp_path, tail):
    file = tmp_path / "a.csv"
    file.write_text("a,b,0.012,1,98,0\na,b,0.013,2,98,1\n" + tail)  # a folder's name may hold a comma
    (found,) = contenders(cli("bench", "--import", file, *PIXEL, "--json"))
    assert found["samples"] == {"run_ms": pytest.approx([12, 13])}  # which part it is, nobody says
    assert found["name"] == "a,b on Pixel 9, Android 15 onnx"


def test_parts_of_one_answer_are_one_contender(cli, tmp_path):
    vision = tmp_path / "vision.csv"
    shutil.copy(PERF_TEST, vision)
    argv = ("--import", f"vision={vision}", "--import", f"decode={PERF_TEST}", *PIXEL)
    (found,) = contenders(cli("bench", *argv, "--json"))
    assert found["name"] == "Pixel 9, Android 15 onnx"
    assert set(found["metrics"]) == {"vision_ms", "decode_ms", "decode_tokens_per_s"}
    assert found["peak_memory_bytes"] is None  # of both together nothing is known
    text = cli("bench", *argv)
    for expected in ("vision ms", "decode ms a token", "measured on", "Pixel 9"):
        assert expected in text.out


def test_several_files_side_by_side(cli, tmp_path):
    """In one table that fits, whatever they are called."""
    argv = ("--import", XCODE, "--import", latency(tmp_path / "a.json"), "--import", PERF_TEST, *PIXEL)
    names = [found["name"] for found in contenders(cli("bench", *argv, "--json"))]
    assert names == ["vision on iPhone 16 CPU+ANE", "app", "onnx on Pixel 9, Android 15 onnx"]
    text = cli("bench", *argv).out
    for expected in ("one run ms", "first token ms", "iOS 26.1", "peak memory", "Core ML"):
        assert expected in text


def test_a_result_of_another_machine(cli, tmp_path):
    """Imported alone it is the run that it was; beside others its contenders get its machine's name."""
    saved = tmp_path / "saved.json"
    first = cli(
        "bench", "--import", latency(tmp_path / "a.json"), "--save-baseline", saved, "--json"
    ).document
    again = cli("bench", "--import", saved, "--json").document
    assert again == first
    beside = ("--import", saved, "--import", XCODE)
    names = [found["name"] for found in contenders(cli("bench", *beside, "--json"))]
    assert names == ["app", "vision on iPhone 16 CPU+ANE"]


PERF_LINE = "onnx,{},1,98,{}\n"
REFUSED = {
    "nothing": ("", None, "neither JSON"),
    "no_format": ('{"a": 1}', None, "not a known format"),
    "a_text": ('"hello"', None, "not a known format"),
    "a_list": ("[]", None, "not a known format"),
    "half_a_file": ('{"schema": "fastvlm-conv', None, "neither JSON"),
    "another_version": (None, {"schema_version": 2}, "version 2 of this format; this tool reads 1"),
    "unknown_metric": (None, {"samples": {"speed": [1]}}, "unknown setting samples.speed"),
    "unknown_key": (None, {"phone": "x"}, "unknown setting phone"),
    "no_device": (None, {"measured_on": None}, "missing setting measured_on"),
    "no_samples": (None, {"samples": {}}, "the file has no samples"),
    "a_text_for_a_number": (None, {"samples": {"ttft_ms": ["1"]}}, "ttft_ms[0] is '1', expected a number"),
    "zero": (None, {"samples": {"ttft_ms": [1, 0]}}, "ttft_ms[1] of 'app' is 0.0, expected a number above 0"),
    "negative": (None, {"samples": {"ttft_ms": [-1]}}, "expected a number above 0"),
    "load_of_nothing": (None, {"load_ms": -3}, "load_ms is -3.0, expected a number above 0"),
    "warmup_of_nothing": (None, {"warmup": {"ttft_ms": 0}}, "ttft_ms[0] of 'app' is 0.0"),
    "not_a_number": (
        '{"schema": "fastvlm-convert/latency", "schema_version": 1, "name": "a", "measured_on": "b", '
        '"executed_by": "c", "samples": {"ttft_ms": [NaN]}}',
        None,
        "expected a number above 0",
    ),
    "perf_test_appended": (
        (PERF_LINE.format(1, 0) + PERF_LINE.format(2, 1)) * 2,
        None,
        "line 3 begins another run of the tool, which appends",
    ),
    "perf_test_cut": (PERF_LINE.format(1, 0) + PERF_LINE.format(2, 2), None, "line 2 is run 2, expected 1"),
    "perf_test_damaged": (PERF_LINE.format(1, 0) + "onnx,oops\n", None, "line 2 is 'onnx,oops', expected"),
    "perf_test_of_zero": (PERF_LINE.format(0, 0), None, "line 1 says that a run took 0 seconds"),
    "perf_test_lines_lost": (
        PERF_LINE.format(0.5, 0) + "\nMin Latency: 0.25 s\n",
        None,
        "line 3 says 'Min Latency: 0.25 s', and the lines before it 0.5 s",
    ),
    "xcode_without_predictions": (
        '{"deviceInfo": {"modelName": "iPhone 16"}, "deviceResults": {"load": {"samples": [1]}}}',
        None,
        "the report has no deviceResults.predict.samples",
    ),
    "xcode_without_a_device": (
        '{"deviceResults": {"predict": {"samples": [1]}}}',
        None,
        "the report does not say which device",
    ),
    "xcode_of_texts": (
        '{"deviceInfo": {"modelName": "iPhone 16"}, "deviceResults": {"predict": {"samples": ["1"]}}}',
        None,
        "deviceResults.predict.samples is ['1'], expected numbers",
    ),
    "xcode_of_a_list": ('{"deviceResults": []}', None, "deviceResults is [], expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(cli, tmp_path, name):
    text, changes, message = REFUSED[name]
    file = tmp_path / "phone.json"
    if text is None:
        latency(file, **changes)
    else:
        file.write_text(text)
    device = () if "without_a_device" in name else PIXEL
    result = cli("bench", "--import", file, *device)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert str(file) in result.err
    assert "hint: " in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--import", "NONE"), "there is no such file"),
        (("--import", "EMPTY"), "the folder has no report.json"),
        (("--import", "CSV"), "does not say which device"),
        (("--import", "CSV", "--import", "CSV", *PIXEL), "another file has the same figures"),
        (("--import", "vision=CSV", "--import", "vision=CSV", *PIXEL), "another file has the same figures"),
        (("--import", "vision=OURS"), "the file says itself which parts of an answer it measures"),
        (("--import", "OURS", "OURS"), "is a file, and bundles are folders"),
        (("--import", "OURS", "--reference", "EMPTY"), "--reference needs a bundle"),
        (("--import", "OURS", "--against", "EMPTY"), "--against a bundle measures it beside others"),
        (("--import", "OURS", "--any-machine"), "--any-machine needs --against"),
        (("--import", "OURS", "--max-regression", "3"), "--max-regression needs --against"),
        (("--import", "OURS", "--save-baseline", "EMPTY"), "the baseline is a folder"),
        (("--import", "OURS", "--save-baseline", "CSV"), "the file is no result of bench"),
        (("--import", "OURS", "--save-baseline", "NONE/NONE"), "there is no such folder"),
        (("EMPTY", *PIXEL), "--measured-on needs --import"),
        ((), "Missing argument 'BUNDLE...'"),
    ],
)
def test_arguments_that_are_refused(cli, tmp_path, argv, message):
    csv = tmp_path / "a.csv"
    shutil.copy(PERF_TEST, csv)
    (tmp_path / "empty").mkdir()
    paths = {"NONE": tmp_path / "none", "EMPTY": tmp_path / "empty", "CSV": csv}
    paths["OURS"] = latency(tmp_path / "a.json")

    def place(text: str) -> str:
        for name, path in paths.items():
            text = text.replace(name, str(path))
        return text

    before = csv.read_text()
    result = cli("bench", *map(place, argv))
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "hint: " in result.err
    assert csv.read_text() == before
