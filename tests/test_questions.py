import json

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.errors import ImageError
from fastvlm_convert.questions import (
    DEFAULT_QUESTION,
    hard_questions,
    mixed_questions,
    read_questions,
    standard_questions,
)


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
    assert [np.asarray(q.images[0])[0, 0].argmax() for q in found] == [2, 0]  # a blue, b red


def test_a_listing_decides(folder):
    entries = [
        {"image": "b.png", "question": "What?", "answer": "Red."},
        {"image": "b.png", "question": "W?"},
    ]
    (folder / "questions.json").write_text(json.dumps(entries))
    found = read_questions(folder)
    assert [q.text for q in found] == ["What?", "W?"]
    assert all(np.asarray(q.images[0])[0, 0].argmax() == 0 for q in found)


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
    with pytest.raises(ImageError, match="no images here") as caught:
        read_questions(tmp_path)
    assert "give a folder of images" in caught.value.hint


def test_no_folder(tmp_path):
    with pytest.raises(ImageError, match="there is no such folder of images"):
        read_questions(tmp_path / "none")


def test_lines(folder):
    path = folder / "data.jsonl"
    lines = [
        {"image": "b.png", "question": "What\u2028now?", "answer": "Red."},
        {"image": "a.JPG", "question": "W?", "answer": None},
    ]
    path.write_text(
        "\n" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", "utf-8"
    )
    found = read_questions(path)
    assert [(q.text, q.answer) for q in found] == [("What\u2028now?", "Red."), ("W?", None)]
    assert [np.asarray(q.images[0])[0, 0].argmax() for q in found] == [0, 2]


@pytest.mark.parametrize(
    "entry",
    [
        "1",
        "[]",
        '{"image": "b.png"}',
        '{"image": "b.png", "images": [], "question": "?"}',
        '{"image": "b.png", "question": "?", "answer": 4}',
    ],
)
def test_a_malformed_line(folder, entry):
    path = folder / "data.jsonl"
    path.write_text('{"image": "b.png", "question": "?"}\n' + entry)
    with pytest.raises(ImageError, match=r"entry 2: expected an object with .*data.jsonl"):
        read_questions(path)
    path.write_text('\n{"image": "b.png", "question": "?"}\n{')
    with pytest.raises(ImageError, match=r"line 3: not valid JSON.*data.jsonl"):
        read_questions(path)


def test_no_more_than_asked_for_are_read(folder):
    (folder / "c.png").write_text("text")
    assert len(read_questions(folder, 2)) == 2
    with pytest.raises(ImageError, match=r"not an image.*c.png"):
        read_questions(folder, 3)


def test_folders_take_every_format_and_say_what_they_skip(folder):
    below = folder / "holiday" / "2026"
    below.mkdir(parents=True)
    Image.new("RGB", (5, 4), "lime").save(below / "c.avif")
    Image.new("RGB", (5, 4), "lime").save(below / "d.tiff")
    Image.new("RGB", (5, 4), "lime").save(below / "no suffix", format="PNG")
    for hidden in ("._b.png", ".cache/e.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4)).save(folder / hidden)
    found = read_questions(folder)
    assert len(found) == found.num_pictures == 5
    assert found.skipped == ("._b.png (hidden)", ".cache/e.png (hidden)", "notes.txt (not a picture)")
    assert found.notes == (f"3 files were skipped: {'; '.join(found.skipped)}",)


def test_distinct_pictures_go_first(folder):
    path = folder / "data.jsonl"
    asked = [("b.png", "1"), ("b.png", "2"), ("a.JPG", "3"), ("b.png", "4"), ("a.JPG", "5")]
    path.write_text("\n".join(json.dumps({"image": i, "question": q}) for i, q in asked))
    found = read_questions(path, 3)
    assert [q.text for q in found] == ["1", "3", "2"]
    assert found.notes == ("3 of 5 questions are used, about 2 distinct pictures",)
    assert [q.text for q in read_questions(path)] == ["1", "3", "2", "5", "4"]
    assert read_questions(path).notes == ()


def test_text_alone_and_several_pictures(folder):
    path = folder / "data.jsonl"
    entries = [
        {"question": "Who?"},
        {"images": ["a.JPG", "b.png"], "question": "Same?"},
        {"images": [], "question": "?"},
    ]
    path.write_text("\n".join(map(json.dumps, entries)))
    found = read_questions(path)
    assert [(q.text, len(q.images)) for q in found] == [("Who?", 0), ("Same?", 2), ("?", 0)]
    assert found.num_pictures == 2


def test_what_calibrates_by_default_is_not_what_is_asked_by_default():
    found = mixed_questions(15, str.isascii)
    assert found.num_pictures == sum(len(q.images) for q in found) == 13
    assert [q.text for q in found[:15]] == [q.text for q in mixed_questions(19, str.isascii)[:15]]
    asked = [*found, *standard_questions()]
    pictures = [image.tobytes() for question in asked for image in question.images]
    assert len(set(pictures)) == len(pictures) == 13 + 16
    assert len({q.label for q in found}) == len(found) == 36


def test_sixteen_standard_pictures():
    found = standard_questions()
    assert len(found) == 16
    assert all(q.images[0].mode == "RGB" and q.text for q in found)
    again = standard_questions()
    assert [q.text for q in again] == [q.text for q in found]
    for a, b in zip(again, found, strict=True):
        np.testing.assert_array_equal(np.asarray(a.images[0]), np.asarray(b.images[0]))


def test_hard_questions_are_about_changed_pictures_and_about_none():
    asked, plain = hard_questions(), standard_questions()
    assert (len(asked), asked.num_pictures, asked.notes) == (36, 32, ())
    again = hard_questions()
    pictures = [np.asarray(q.images[0]).tobytes() for q in asked if q.images]
    assert pictures == [np.asarray(q.images[0]).tobytes() for q in again if q.images]
    assert len({*pictures, *(np.asarray(q.images[0]).tobytes() for q in plain)}) == 32 + 16
    assert [q.text for q in asked[:32]] == 2 * [q.text for q in plain]
    assert len({q.label for q in asked[:32]}) == 32
    assert {(q.images, q.label) for q in asked[32:]} == {((), None)}


def test_pictures_are_called_by_their_files(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [q.label for q in read_questions(tmp_path)] == ["a.png", "b.png"]
    entries = [{"images": ["a.png", "b.png"], "question": "Same?"}, {"question": "Well?"}]
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    assert [q.label for q in read_questions(tmp_path)] == ["a.png, b.png", None]
