import io
import json
import os
import pty
import subprocess
import sys

import pytest

from tests.bundles import export_bundle, recipe
from tests.checkpoints import LLAVA, edit_json, golden_cases, golden_checkpoint
from tests.cli.conftest import CHECKPOINT, IMAGE, read_all

CASES = [case for case in golden_cases() if case.name == LLAVA]
CASE = CASES[0]


@pytest.fixture(params=["checkpoint", "bundle"])
def model(request, fp32_bundle):
    return CHECKPOINT if request.param == "checkpoint" else fp32_bundle


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_gives_the_golden_answer(cli, model, case):
    result = cli("run", model, case.image, case.question, "--max-new-tokens", 24)
    assert result.code == 0
    assert result.out == f"{case.greedy_text}\n"
    assert result.err == "warning: the answer was cut at 24 tokens (--max-new-tokens)\n"


def test_document(cli, model):
    result = cli("run", model, CASE.image, CASE.question, "--max-new-tokens", 24, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    timings = document.pop("timings")
    executed_by = document.pop("executed_by")
    assert document == {
        "schema": "fastvlm-convert/run",
        "schema_version": 1,
        "command": "run",
        "status": "passed",
        "text": CASE.greedy_text,
        "token_ids": CASE.greedy_token_ids,
        "finished": False,
        "encoded_images": 1,
        "cached_tokens": 0,
    }
    assert executed_by.startswith("torch" if model == CHECKPOINT else "onnxruntime")
    assert timings["prompt_tokens"] == len(CASE.ids_before_image) + 16 + len(CASE.ids_after_image)
    assert timings["answer_tokens"] == 24
    assert timings["decode_tokens_per_s"] > 0
    assert timings["ttft_s"] >= timings["vision_s"] + timings["prefill_s"] > 0


@pytest.mark.parametrize("listed", [True, False])
def test_it_stops_at_any_end_token(cli, llava, listed):
    """The sixth token of the golden answer, made one of several end tokens."""
    end = CASE.greedy_token_ids[5]
    edit_json(llava / "generation_config.json", {"eos_token_id": [431, end] if listed else end})
    result = cli("run", llava, CASE.image, CASE.question, "--json")
    assert result.document["token_ids"] == CASE.greedy_token_ids[:5]
    assert result.document["finished"] is True
    assert cli("run", llava, CASE.image, CASE.question).err == ""


def test_a_bundle_stops_where_its_checkpoint_does(cli, llava, tmp_path):
    edit_json(llava / "generation_config.json", {"eos_token_id": [431, CASE.greedy_token_ids[5]]})
    bundle = export_bundle(llava, tmp_path / "bundle")
    result = cli("run", bundle, CASE.image, CASE.question, "--json")
    assert result.document["token_ids"] == CASE.greedy_token_ids[:5]


@pytest.mark.parametrize("question", ["How many?", "Is <image> like <image>?"])
def test_text_alone_and_several_images(cli, fp32_bundle, question):
    images = [IMAGE] * question.count("<image>")
    answers = [
        cli("run", m, *images, question, "--max-new-tokens", 12, "--json").document["token_ids"]
        for m in (CHECKPOINT, fp32_bundle)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) >= 10


def test_a_question_longer_than_any_file_name(cli, fp32_bundle):
    result = cli("run", fp32_bundle, "How many circles are there? " * 20, "--max-new-tokens", 1)
    assert result.code == 0


class TestSampling:
    ARGUMENTS = ("Describe the image.", "--max-new-tokens", 12, "--json")

    def tokens(self, cli, fp32_bundle, *more):
        return cli("run", fp32_bundle, IMAGE, *self.ARGUMENTS, *more).document["token_ids"]

    def test_only_when_asked(self, cli, fp32_bundle):
        assert self.tokens(cli, fp32_bundle) == self.tokens(cli, fp32_bundle, "--seed", 5)

    def test_equal_seeds_give_equal_answers(self, cli, fp32_bundle):
        hot = ("--temperature", 1.5)
        first = self.tokens(cli, fp32_bundle, *hot, "--seed", 1)
        assert first == self.tokens(cli, fp32_bundle, *hot, "--seed", 1)
        assert first != self.tokens(cli, fp32_bundle, *hot, "--seed", 2)

    def test_a_low_temperature_leaves_the_likeliest(self, cli, fp32_bundle):
        assert self.tokens(cli, fp32_bundle, "--temperature", 0.001) == self.tokens(cli, fp32_bundle)


def test_the_answer_fits_the_context_where_no_length_is_given(cli, tmp_path):
    settings = recipe(common={"max_context_length": 64})
    bundle = export_bundle(CHECKPOINT, tmp_path / "bundle", settings)
    document = cli("run", bundle, CASE.image, CASE.question, "--json").document
    assert document["timings"]["prompt_tokens"] + len(document["token_ids"]) == 64


class Terminal(io.StringIO):
    """Standard output that is a terminal; keeps what was written in the pieces in which it came."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_terminal_sees_the_answer_as_it_comes(cli, fp32_bundle, monkeypatch, case):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    cli("run", fp32_bundle, case.image, case.question, "--max-new-tokens", 24)
    assert terminal.getvalue() == f"{case.greedy_text}\n"  # also where it ends in half a character
    assert len(terminal.pieces) > 10
    tokenizer = golden_checkpoint(LLAVA).tokenizer
    starts = {tokenizer.decode(case.greedy_token_ids[:n]) for n in range(25)}
    seen = ""
    for piece in terminal.pieces[:-1]:
        seen += piece
        assert seen in starts
        assert not seen.endswith("\ufffd")


def test_json_is_not_streamed(cli, fp32_bundle, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    cli("run", fp32_bundle, IMAGE, "Hi", "--max-new-tokens", 4, "--json")
    assert len(terminal.pieces) == 1
    assert json.loads(terminal.getvalue())["status"] == "passed"


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_on_a_real_terminal(fp32_bundle, case):
    """Answer on one terminal, bars on another."""
    out, out_side = pty.openpty()
    err, err_side = pty.openpty()
    command = [sys.executable, "-m", "fastvlm_convert", "run", fp32_bundle, case.image, case.question]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "24"], stdout=out_side, stderr=err_side, stdin=subprocess.DEVNULL
    )
    os.close(out_side)
    os.close(err_side)
    answer, bars = read_all(out), read_all(err)
    assert process.wait() == 0
    assert answer.decode() == f"{case.greedy_text}\n".replace("\n", "\r\n")
    assert b"the answer was cut at 24 tokens" in bars
