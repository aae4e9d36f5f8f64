import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import pytest

from fastvlm_convert.demo import held_out
from fastvlm_convert.user_cache import cache_folder
from tests.bundles import copy_bundle
from tests.cli.conftest import CHECKPOINT
from tests.evaluation.annotations import picture, textvqa, write_lines

SHORT = ("--max-new-tokens", 2)


@pytest.fixture(autouse=True)
def _own_journals(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def mine(cli, fp32_bundle, tmp_path):
    """Four questions; the checkpoint's and its bundle's answers to the first three are right."""
    entries = []
    for number, color in enumerate(("red", "blue", "green", "white")):
        path = picture(tmp_path / "data" / f"{color}.png", color)
        said = cli("run", fp32_bundle, path, "What?", *SHORT, "--json").document["text"]
        right = said if number < 3 else "something else entirely"
        entries.append({"id": color, "image": path.name, "question": "What?", "answers": [right or "-"]})
    return write_lines(tmp_path / "data" / "mine.jsonl", entries)


def journals():
    return list(cache_folder().glob("evaluations/*/*"))


def test_document(cli, fp32_bundle, mine):
    result = cli("evaluate", CHECKPOINT, fp32_bundle, "--dataset", mine, *SHORT, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert (document["schema"], document["schema_version"]) == ("fastvlm-convert/evaluate", 1)
    assert (document["command"], document["status"]) == ("evaluate", "passed")
    facts = document["dataset"]
    assert (facts["layout"], facts["num_items"], facts["metric"]) == ("jsonl", 4, "exact_match")
    assert document["settings"] == {"max_new_tokens": 2, "instruction": None}
    for model in document["models"]:
        exact, vqa, _ = model["scores"]
        assert (exact["metric"], exact["value"], exact["interval"]) == ("exact_match", 0.75, None)
        assert exact["reason"] == "no interval: 4 pictures, and fewer than 30 say too little about others"
        assert vqa["value"] is None
        assert len(model["sha256"]) == 64
    assert [d["value"] for d in document["models"][1]["differences"]] == [0, None, 0]
    item = document["items"][3]
    assert (item["id"], item["image"], item["question"]) == ("white", "white.png", "What?")
    assert item["answers"] == ["something else entirely"]
    assert [r["scores"]["exact_match"] for r in item["responses"]] == [0, 0]
    assert document["num_differing"] == 0
    assert journals() == []  # what is reported need not be remembered


def test_text(cli, fp32_bundle, mine):
    result = cli("evaluate", CHECKPOINT, fp32_bundle, "--dataset", mine, *SHORT)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split() == ["exact", "match*", "ANLS", "executed", "by"]
    assert lines[1].startswith("checkpoint")
    assert "75.0 %" in lines[1]
    assert "less the first" in lines[3]
    assert "0.0 points" in lines[3]
    for text in (
        "mine.jsonl (jsonl): 4 questions about 4 pictures; * marks the score",
        "VQA accuracy not run: every question has fewer than 4 answers",
        "no interval: 4 pictures, and fewer than 30 say too little about others",
        "0 of 4 questions are answered differently",
        "answers were cut at the limit (--max-new-tokens)",
    ):
        assert text in result.err


def test_quiet(cli, fp32_bundle, mine):
    result = cli("evaluate", fp32_bundle, "--dataset", mine, *SHORT, "--min-accuracy", 70, "-q")
    assert result.out == "passed: fp32 onnx: exact match 75.0 %, at least 70 % is required\n"
    assert result.err == ""


@pytest.mark.parametrize(
    ("gate", "code", "status"),
    [
        (("--min-accuracy", 75), 0, "passed"),
        (("--min-accuracy", 75.1), 1, "failed"),
        (("--max-drop", 0), 0, "passed"),
    ],
)
def test_gates(cli, fp32_bundle, mine, gate, code, status):
    result = cli("evaluate", CHECKPOINT, fp32_bundle, "--dataset", mine, *SHORT, *gate, "--json")
    assert (result.code, result.document["status"]) == (code, status)
    gates = [o for o in result.document["outcomes"] if o["severity"] == "error"]
    assert {o["id"] for o in gates} == {gate[0].removeprefix("--")}
    assert {o["status"] for o in gates} == {status}


def test_a_drop_against_the_first(cli, fp32_bundle, tmp_path):
    path = picture(tmp_path / "data" / "a.png")
    said = cli("run", fp32_bundle, path, "What?", *SHORT, "--json").document["text"]
    entries = [
        {"image": "a.png", "question": "What?", "answers": [said]},
        {"image": "a.png", "question": "Why?", "answers": ["none of these"]},
    ]
    dataset = write_lines(tmp_path / "data" / "mine.jsonl", entries)
    damaged = copy_bundle(fp32_bundle, tmp_path)
    weights = next(damaged.glob("onnx/decoder*data"))
    weights.write_bytes(bytes(weights.stat().st_size))
    argv = ("evaluate", fp32_bundle, damaged, "--dataset", dataset, *SHORT, "--max-drop")
    result = cli(*argv, 49, "-o", tmp_path / "d.md")
    assert result.code == 1
    assert "failed bundle onnx: exact match -50.0 points against fp32 onnx, at most 49 below" in result.out
    assert "2 of 2 questions are answered differently, in " in result.err
    text = (tmp_path / "d.md").read_text()
    assert text.startswith("# Differing answers: 2 of 2 questions of mine.jsonl\n")
    assert text.count("| *expected* |") == 2
    assert cli(*argv, 50).code == 0
    github = cli(*argv, 49, "--output-format", "github").out
    assert github.startswith("::error title=max-drop::bundle onnx: exact match -50.0 points")
    junit = ET.fromstring(cli(*argv, 49, "--output-format", "junit").out)
    assert (junit.get("tests"), junit.get("failures")) == ("3", "1")


def test_a_gate_that_cannot_be_judged_is_not_run(cli, fp32_bundle, tmp_path):
    path = textvqa(tmp_path / "data")
    value = json.loads(path.read_text())
    value["data"][0]["answers"] = ["dakota"]
    path.write_text(json.dumps(value))
    argv = ("evaluate", fp32_bundle, "--dataset", path, *SHORT, "--min-accuracy", 1)
    result = cli(*argv, "--json")
    assert (result.code, result.document["status"]) == (2, "not_run")
    assert "VQA accuracy not run: every question has fewer than 4 answers" in cli(*argv).out


def test_published_annotations(cli, fp32_bundle, tmp_path):
    result = cli("evaluate", fp32_bundle, "--dataset", textvqa(tmp_path / "data"), *SHORT, "--json")
    _, vqa, _ = result.document["models"][0]["scores"]
    assert (vqa["value"], vqa["num_items"]) == (0, 1)


class TestDifferences:
    def test_wrong_answers_of_one_model(self, cli, fp32_bundle, mine, tmp_path):
        result = cli("evaluate", fp32_bundle, "--dataset", mine, *SHORT, "-o", tmp_path / "wrong.jsonl")
        assert "1 of 4 questions is answered wrongly, in " in result.err
        [line] = (tmp_path / "wrong.jsonl").read_text().splitlines()
        item = json.loads(line)
        assert (item["id"], item["answers"]) == ("white", ["something else entirely"])
        assert item["responses"]["fp32 onnx"]["scores"]["exact_match"] == 0

    def test_markdown_shows_texts_as_they_are(self, cli, fp32_bundle, tmp_path):
        picture(tmp_path / "a.png")
        entry = {"image": "a.png", "question": "# A | <b>?\n*b*", "answers": ["[x](y)"]}
        dataset = write_lines(tmp_path / "mine.jsonl", [entry])
        assert cli("evaluate", fp32_bundle, "--dataset", dataset, *SHORT, "-o", tmp_path / "w.md").code == 0
        text = (tmp_path / "w.md").read_text()
        assert r"a.png: \# A \| \<b\>? \*b\*" in text
        assert r"| *expected* | \[x\](y) | |" in text

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("d.txt", "the ending '.txt' is not known"),
            ("none/d.md", "there is no such folder"),
            ("mine.jsonl", "the output exists"),
        ],
    )
    def test_a_place_that_will_not_do_is_refused_first(self, cli, fp32_bundle, mine, name, message):
        result = cli("evaluate", fp32_bundle, "--dataset", mine, "-o", mine.parent / name)
        assert (result.code, result.out) == (2, "")
        assert message in result.err
        assert journals() == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--dataset", "none.jsonl"), "error: there is no such dataset (none.jsonl)"),
        ((), "Missing option '--dataset'"),
        (
            ("--dataset", "demo", "--max-drop", 1),
            "--max-drop compares with the first model, and there is one",
        ),
        (("--dataset", "demo", "--target", "coreml"), "the bundle has no target 'coreml'"),
        (("--dataset", "demo", "--images", "x"), "the demo draws its pictures itself"),
        (("--dataset", "demo", "--limit", 0), "Invalid value for '--limit'"),
        (("--dataset", "demo", "--json", "--output-format", "junit"), "exclude each other"),
    ],
)
def test_what_cannot_be_asked(cli, fp32_bundle, argv, message):
    result = cli("evaluate", fp32_bundle, *argv)
    assert result.code == 2
    assert message in result.err + result.out


def test_a_run_that_was_killed_goes_on(cli, fp32_bundle):
    argv = ("evaluate", str(fp32_bundle), "--dataset", "demo", "--limit", "12", "--max-new-tokens", "9")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_convert", *argv], env=dict(os.environ),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(file.suffix == ".jsonl" and file.read_text().count("\n") > 2 for file in journals()):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    result = cli(*argv, "--json")
    assert result.code == 0
    assert "answers come from the journal of an interrupted run" in result.document["warnings"][0]
    assert len(result.document["items"]) == 12
    again = cli(*argv, "--json").document
    assert again["warnings"] == []
    assert again["items"] == result.document["items"]


def test_the_demos_answers_are_those_of_its_scenes(cli, fp32_bundle):
    document = cli("evaluate", fp32_bundle, "--dataset", "demo", "--limit", 3, *SHORT, "--json").document
    expected = [sample.questions[n % len(sample.questions)].answer for n, sample in enumerate(held_out(3))]
    assert [item["answers"] for item in document["items"]] == [[answer] for answer in expected]
    assert [item["image"] for item in document["items"]] == ["demo/0", "demo/1", "demo/2"]


def test_one_question_is_not_called_questions(cli, mine):
    result = cli("evaluate", CHECKPOINT, "--dataset", mine, "--limit", 1, *SHORT)
    assert "1 question of 4 about 1 picture; * marks the score" in result.err
    assert "no interval: 1 picture, and fewer than 30" in result.err
    assert "of 1 question " in result.err
