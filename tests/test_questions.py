import json

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.errors import ImageError
from fastvlm_convert.questions import DEFAULT_QUESTION, read_questions, standard_questions


@pytest.fixture
def folder(tmp_path):
    for name, color in (("b.png", "red"), ("a.JPG", "blue"), ("notes.txt", None)):
        if color is None:
            (tmp_path / name).write_text("no picture")
        else:
            Image.new("RGB", (5, 4), color).save(tmp_path / name)
    return tmp_path


def test_pictures_are_taken_in_the_order_of_their_names(folder):
    found = read_questions(folder)
    assert [q.text for q in found] == [DEFAULT_QUESTION] * 2
    assert [np.asarray(q.image)[0, 0].argmax() for q in found] == [2, 0]  # a blue, b red


def test_a_listing_decides(folder):
    entries = [
        {"image": "b.png", "question": "What?", "answer": "Red."},
        {"image": "b.png", "question": "W?"},
    ]
    (folder / "questions.json").write_text(json.dumps(entries))
    found = read_questions(folder)
    assert [q.text for q in found] == ["What?", "W?"]
    assert all(np.asarray(q.image)[0, 0].argmax() == 0 for q in found)


@pytest.mark.parametrize(
    "content",
    ["{", '{"image": "b.png"}', '["b.png"]', '[{"image": "b.png"}]', "[1]", "1", "[" * 100_000, '"b"'],
    ids=["broken", "mapping", "names", "no_question", "numbers", "number", "deep", "text"],
)
def test_a_malformed_listing(folder, content):
    (folder / "questions.json").write_text(content)
    with pytest.raises(ImageError, match=r"expected a|not valid JSON") as caught:
        read_questions(folder)
    assert str(folder / "questions.json") in str(caught.value)


def test_an_empty_listing(folder):
    (folder / "questions.json").write_text("[]")
    with pytest.raises(ImageError, match="no entries here"):
        read_questions(folder)


def test_a_picture_that_is_listed_but_not_there(folder):
    (folder / "questions.json").write_text('[{"image": "c.png", "question": "?"}]')
    with pytest.raises(ImageError, match=r"there is no such image \(.*c.png\)"):
        read_questions(folder)


def test_a_picture_that_is_none(folder):
    (folder / "c.png").write_text("text")
    with pytest.raises(ImageError, match=r"not an image.*c.png"):
        read_questions(folder)


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(ImageError, match=r"no images here \(.png, "):
        read_questions(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(ImageError, match="there is no such folder of images"):
        read_questions(tmp_path / "none")


def test_sixteen_standard_pictures():
    found = standard_questions()
    assert len(found) == 16
    assert all(q.image.mode == "RGB" and q.text for q in found)
    again = standard_questions()
    assert [q.text for q in again] == [q.text for q in found]
    for a, b in zip(again, found, strict=True):
        np.testing.assert_array_equal(np.asarray(a.image), np.asarray(b.image))
