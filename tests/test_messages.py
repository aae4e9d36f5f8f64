import json

import pytest
from PIL import Image

from fastvlm_convert.errors import ImageError, PromptError
from fastvlm_convert.messages import read_messages


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def test_a_conversation(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "?"},
    ]
    value = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why? <image>"},
    ]
    found = read_messages(write(tmp_path / "m.json", value))
    assert [m.role for m in found] == ["system", "user", "assistant", "user"]
    assert (found[0].content, found[2].content, found[3].content) == (
        ("Be brief.",),
        ("Yes.",),
        ("Why? <image>",),
    )
    before, picture, after = found[1].content
    assert (before, after) == ("Is ", "?")
    assert picture.image.getpixel((0, 0)) == (255, 0, 0)
    assert not picture.inline


USER = {"role": "user", "content": "?"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ({}, "expected a list"),
        ([USER] * 1001, "at most 1000 messages"),
        ([], "roles of the messages are none"),
        ([1], "message 1: expected an object with 'role'"),
        ([{"role": "robot", "content": "?"}], "system, user, assistant"),
        ([{**USER, "name": "x"}], "message 1: expected an object"),
        ([USER, {"role": "assistant", "content": []}], "message 2: content is a text, or a list"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: content is"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "image": "b"}]}], "content is"),
        ([{"role": "user", "content": 4}], "content is"),
        ([USER, USER], "roles of the messages are user, user"),
    ],
)
def test_malformed(tmp_path, value, message):
    with pytest.raises(PromptError, match=message) as caught:
        read_messages(write(tmp_path / "m.json", value))
    assert caught.value.hint


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(PromptError, match="no such file of messages"):
        read_messages(tmp_path / "m.json")
    with pytest.raises(PromptError, match="it is a folder, not a file"):
        read_messages(tmp_path)
    value = [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]
    with pytest.raises(ImageError, match=r"no such image .*gone.png"):
        read_messages(write(tmp_path / "m.json", value))
