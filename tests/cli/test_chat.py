"""Conversations, through `chat` and `run --messages`: both and `run` are the same code."""

import io
import json
from typing import Any

import pytest

from fastvlm_convert.prompt import Message, user_message
from fastvlm_convert.runtime.loaded import load_reference
from tests.checkpoints import GOLDEN, LLAVA, golden_checkpoint
from tests.cli.conftest import CHECKPOINT, IMAGE, Cli

OTHER = GOLDEN / LLAVA / "image1.png"
SHORT = ("--max-new-tokens", "8")


@pytest.fixture
def typed(monkeypatch):
    """What a user types."""

    def type_(*lines: object) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return type_


def test_a_second_question_has_the_first_before_it(cli: Cli, typed, tmp_path):
    typed(
        "What is this?", "", "And now?", "/reset", f"/image {IMAGE}", "What is this?", "/quit", "never read"
    )
    found = cli("chat", CHECKPOINT, IMAGE, *SHORT)
    first, second, again = found.out.splitlines()
    assert found.code == 0
    assert first == again == cli("run", CHECKPOINT, IMAGE, "What is this?", *SHORT).out.removesuffix("\n")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(IMAGE)}, {"type": "text", "text": "What is this?"}],
        },
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And now?"},
    ]
    path = tmp_path / "messages.json"
    path.write_text(json.dumps(messages))
    assert cli("run", CHECKPOINT, "--messages", path, *SHORT).out == f"{second}\n"


@pytest.fixture(params=["checkpoint", "bundle"])
def model(request, fp32_bundle):
    return CHECKPOINT if request.param == "checkpoint" else fp32_bundle


def test_a_picture_is_encoded_once_and_what_was_said_is_not_read_again(cli: Cli, typed, model, tmp_path):
    typed("What is this?", "Who?", "Where?", f"/image {OTHER}", "And this?")
    turns = cli("chat", model, IMAGE, "--json", *SHORT).document["turns"]
    assert [turn["encoded_images"] for turn in turns] == [1, 0, 0, 1]
    # Only ONNX Runtime's sequences can begin in the middle: each then reads from the last answer on.
    lengths = [turn["timings"]["prompt_tokens"] for turn in turns]
    known = [0, 0, 0, 0] if model == CHECKPOINT else [0, *lengths[:-1]]
    assert [turn["cached_tokens"] for turn in turns] == known
    # And the answers are those of whoever reads all of it at once.
    for number, turn in enumerate(turns):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(_messages(turns[: number + 1])))
        alone = cli("run", model, "--messages", path, "--json", *SHORT).document
        assert (alone["encoded_images"], alone["cached_tokens"]) == (2 if number == 3 else 1, 0)
        assert alone["token_ids"] == turn["token_ids"]


def test_a_picture_that_is_there_twice_is_encoded_once(cli: Cli, model, tmp_path):
    parts = [{"type": "image", "image": str(path)} for path in (IMAGE, OTHER, IMAGE)]
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": [*parts, {"type": "text", "text": "Who?"}]}]))
    assert cli("run", model, "--messages", path, "--json", *SHORT).document["encoded_images"] == 2


def _messages(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation of the turns up to the last question, which has no answer yet."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        pictures = {0: [IMAGE], 3: [OTHER]}.get(number, [])
        parts = [{"type": "image", "image": str(path)} for path in pictures]
        messages += [
            {"role": "user", "content": [*parts, {"type": "text", "text": turn["question"]}]},
            {"role": "assistant", "content": turn["text"]},
        ]
    return messages[:-1]


def test_a_document(cli: Cli, typed):
    typed("What?", "Who?")
    document = cli("chat", CHECKPOINT, "--json", *SHORT).document
    assert [turn["question"] for turn in document["turns"]] == ["What?", "Who?"]
    assert all(turn["token_ids"] for turn in document["turns"])


@pytest.mark.parametrize(
    ("line", "message"),
    [("/image gone.png", "there is no such image"), ("/nonsense", "unknown command '/nonsense'")],
)
def test_a_script_that_goes_wrong_ends(cli: Cli, typed, line, message):
    typed("What?", line, "Who?")
    found = cli("chat", CHECKPOINT, *SHORT)
    assert found.code == 2
    assert message in found.err
    assert len(found.out.splitlines()) == 1


def test_another_system_message(cli: Cli, typed):
    reference = load_reference(golden_checkpoint("tiny-llava"))
    messages = [Message("system", ("Be brief.",)), user_message("Who?", ())]
    expected = reference.reply(messages, max_new_tokens=8)
    answer = expected.finish()
    document = cli("run", CHECKPOINT, "Who?", "--system", "Be brief.", "--json", *SHORT).document
    assert document["token_ids"] == list(answer.token_ids)
    typed("Who?")
    turns = cli("chat", CHECKPOINT, "--system", "Be brief.", "--json", *SHORT).document["turns"]
    assert turns[0]["token_ids"] == list(answer.token_ids)


def test_messages_and_questions_exclude_each_other(cli: Cli, tmp_path):
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "system", "content": "x"}, {"role": "user", "content": "?"}]))
    for arguments, message in (
        (("--messages", path, "Who?"), "takes the place of images and question"),
        ((), "missing argument 'QUESTION'"),
        (("--messages", path, "--system", "y"), "bring a system message already"),
        (("--messages", tmp_path / "none.json"), "there is no such file of messages"),
    ):
        found = cli("run", CHECKPOINT, *arguments)
        assert found.code == 2
        assert message in found.err
        assert "hint: " in found.err
