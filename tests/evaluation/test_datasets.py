import json
import shutil

import numpy as np
import pytest

from fastvlm_convert.demo import held_out
from fastvlm_convert.errors import DatasetError, ImageError
from fastvlm_convert.evaluation.datasets import open_dataset
from tests.evaluation.annotations import (
    ai2d,
    docvqa,
    picture,
    textvqa,
    vqav2,
    write_json,
    write_lines,
)

ENTRY = {"image": "a.png", "question": "What?", "answers": ["red"]}


def opened(path, **options):
    return open_dataset(str(path), **options)


class TestLines:
    def test_questions_of_a_file(self, tmp_path):
        picture(tmp_path / "photos" / "a.png", "blue")
        entries = [
            {"image": "photos/a.png", "question": "What\u2028color?", "answers": ["blue", "navy"], "id": 7},
            {"image": "photos/a.png", "question": "And now?", "answer": "yes", "license": "ours"},
        ]
        path = write_lines(tmp_path / "mine.jsonl", entries)
        path.write_text(path.read_text().replace("\n", "\n\n", 1))  # an empty line is none
        found = opened(path)
        first, second = found.items
        assert (first.id, first.question, first.answers) == ("7", "What\u2028color?", ("blue", "navy"))
        assert (second.id, second.answers, second.place) == ("3", ("yes",), f"{path}:3")
        assert (found.layout, found.metric, found.num_listed, found.num_pictures) == (
            "jsonl", "exact_match", 2, 1,
        )  # fmt: skip
        assert np.asarray(found.picture(first))[0, 0].tolist() == [0, 0, 255]

    def test_the_first_questions_can_be_taken(self, tmp_path):
        picture(tmp_path / "a.png")
        path = write_lines(tmp_path / "mine.jsonl", [ENTRY, {**ENTRY, "image": "missing.png"}])
        assert [item.id for item in opened(path, limit=1).items] == ["1"]
        assert opened(path, limit=1).num_listed == 2

    def test_pictures_may_be_elsewhere(self, tmp_path):
        picture(tmp_path / "elsewhere" / "a.png")
        path = write_lines(tmp_path / "lists" / "mine.jsonl", [ENTRY])
        with pytest.raises(DatasetError, match=r"there is no picture a.png in .*mine.jsonl:1"):
            opened(path)
        assert opened(path, images=tmp_path / "elsewhere").folder == tmp_path / "elsewhere"
        with pytest.raises(DatasetError, match="no such folder of pictures"):
            opened(path, images=tmp_path / "none")

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({**ENTRY, "image": "missing.png"}, "there is no picture missing.png"),
            ({**ENTRY, "image": "../a.png"}, "the picture '../a.png' is outside the dataset's folder"),
            ({**ENTRY, "image": "/etc/passwd"}, "the picture '/etc/passwd' is outside the dataset's folder"),
            ({**ENTRY, "image": "link.png"}, "the picture 'link.png' is outside the dataset's folder"),
            ({**ENTRY, "image": "a.png\0"}, "is outside the dataset's folder"),
            ({**ENTRY, "image": 3}, "image is 3, expected a text"),
            ({**ENTRY, "question": " "}, "question is ' ', expected a text"),
            ({"image": "a.png", "answers": ["x"]}, "question is missing, expected a text"),
            ({**ENTRY, "answers": []}, "the answers are empty"),
            ({**ENTRY, "answers": ["red", ""]}, "an answer is empty"),
            ({**ENTRY, "answers": "red"}, "answers are 'red', expected a list of texts"),
            ({**ENTRY, "answers": [1]}, "expected a list of texts"),
            ({"image": "a.png", "question": "What?"}, "answers are missing"),
            ({**ENTRY, "answer": "red"}, "both answers and answer are there"),
            ({**ENTRY, "id": True}, "id is true, expected an id"),
            ({**ENTRY, "id": "1"}, "the id '1' stands there twice, first at .*mine.jsonl:1"),
            ([1], "the line holds"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, entry, message):
        (tmp_path / "data").mkdir()
        picture(tmp_path / "data" / "a.png")
        picture(tmp_path / "a.png")
        (tmp_path / "data" / "link.png").symlink_to(tmp_path / "a.png")
        path = write_lines(tmp_path / "data" / "mine.jsonl", [ENTRY, entry])
        with pytest.raises(DatasetError, match=message) as caught:
            opened(path)
        assert caught.value.where == f"{path}:2"
        assert caught.value.hint

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"image": "a.png",', r"not valid JSON: .* \(column 19\)"),
            ('{"id": 1, "id": 2}', "the key 'id' stands twice"),
            ("\ufffd", "not valid JSON"),
        ],
    )
    def test_a_line_that_is_no_json_is_named(self, tmp_path, line, message):
        picture(tmp_path / "a.png")
        path = write_lines(tmp_path / "mine.jsonl", [ENTRY])
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(DatasetError, match=message) as caught:
            opened(path)
        assert caught.value.where == f"{path}:2"

    def test_a_file_without_questions(self, tmp_path):
        (tmp_path / "mine.jsonl").write_text("\n")
        with pytest.raises(DatasetError, match="there are no questions"):
            opened(tmp_path / "mine.jsonl")
        (tmp_path / "mine.jsonl").write_bytes(b"\xff\n")
        with pytest.raises(DatasetError, match="byte 0 is no UTF-8"):
            opened(tmp_path / "mine.jsonl")
        with pytest.raises(DatasetError, match="there is no such dataset"):
            opened(tmp_path / "none.jsonl")

    def test_a_picture_that_is_none(self, tmp_path):
        (tmp_path / "a.png").write_text("text")
        found = opened(write_lines(tmp_path / "mine.jsonl", [ENTRY]))
        with pytest.raises(ImageError, match="not an image"):
            found.picture(found.items[0])


class TestHash:
    def test_it_is_that_of_questions_answers_and_pictures(self, tmp_path):
        picture(tmp_path / "one" / "a.png")
        one = write_lines(tmp_path / "one" / "mine.jsonl", [ENTRY])
        first = opened(one).sha256
        assert opened(shutil.copytree(tmp_path / "one", tmp_path / "two") / "mine.jsonl").sha256 == first
        picture(tmp_path / "one" / "a.png", "blue")
        assert opened(one).sha256 != first
        write_lines(tmp_path / "two" / "mine.jsonl", [{**ENTRY, "answers": ["red", "blue"]}])
        assert opened(tmp_path / "two" / "mine.jsonl").sha256 != first


class TestPublished:
    @pytest.mark.parametrize("given", [0, 1])
    def test_vqav2(self, tmp_path, given):
        found = opened(vqav2(tmp_path)[given])
        assert [item.id for item in found.items] == ["42000", "42001", "73000"]
        assert found.items[0].image == "val2014/COCO_val2014_000000000042.jpg"
        assert found.items[2].answers == ("red",) * 7 + ("",) * 3  # as published: an annotator may pass
        assert (found.layout, found.metric, found.num_pictures) == ("vqav2", "vqa_accuracy", 2)

    def test_vqav2_pairs_files_of_other_names(self, tmp_path):
        questions, annotations = vqav2(tmp_path)
        annotations.rename(tmp_path / "my_annotations.json")
        assert len(opened(questions.rename(tmp_path / "my_part_questions.json")).items) == 3

    def test_vqav2_needs_both_files(self, tmp_path):
        questions, annotations = vqav2(tmp_path)
        annotations.unlink()
        with pytest.raises(DatasetError, match=r"expected v2_mscoco_val2014_annotations\.json"):
            opened(questions)

    def test_vqav2_files_must_belong_to_each_other(self, tmp_path):
        questions, annotations = vqav2(tmp_path)
        value = json.loads(annotations.read_text())
        write_json(annotations, {**value, "data_subtype": "train2014"})
        with pytest.raises(DatasetError, match="of different splits: train2014 and val2014"):
            opened(questions)
        write_json(annotations, {**value, "annotations": value["annotations"] * 2})
        with pytest.raises(DatasetError, match="the id 73000 stands there twice"):
            opened(questions)
        write_json(annotations, {**value, "annotations": value["annotations"][:2]})
        with pytest.raises(DatasetError, match="question 42000 has no annotation in v2_mscoco") as caught:
            opened(questions)
        assert caught.value.where == f"{questions}: questions[0]"

    def test_textvqa(self, tmp_path):
        found = opened(textvqa(tmp_path))
        [item] = found.items
        assert (item.id, item.image) == ("34602", "train_images/003a8ae2ef43b901.jpg")
        assert len(item.answers) == 10
        assert (found.layout, found.metric) == ("textvqa", "vqa_accuracy")

    def test_docvqa(self, tmp_path):
        found = opened(docvqa(tmp_path))
        [item] = found.items
        assert (item.id, item.image, item.answers) == ("49153", "documents/pybv0228_81.png", ("0.28",))
        assert (found.layout, found.metric) == ("docvqa", "anls")

    def test_docvqa_of_the_newer_archives(self, tmp_path):
        path = docvqa(tmp_path)
        (tmp_path / "documents").rename(tmp_path / "spdocvqa_images")
        assert opened(path).items[0].image == "spdocvqa_images/pybv0228_81.png"

    def test_ai2d(self, tmp_path):
        found = opened(ai2d(tmp_path))
        first, second = found.items
        assert (first.id, first.image) == ("2.png-0", "images/2.png")
        assert first.question == "What do owls eat?\nA. grass\nB. mice\nC. owls\nD. none"
        assert first.answers == ("B", "mice", "B. mice")
        assert second.id == "10.png-0"  # by number, not by letter
        assert found.notes == (
            "questions about letters (abcLabel), which the published pictures do not show: 1",
        )
        assert opened(tmp_path / "questions").items == found.items
        assert len(opened(tmp_path / "questions" / "2.png.json").items) == 1

    def test_ai2ds_test_split_is_taken_where_it_is_listed(self, tmp_path):
        (ai2d(tmp_path) / "ai2d_test_ids.csv").write_text("10\n99\n")
        found = opened(tmp_path)
        assert [item.id for item in found.items] == ["10.png-0"]
        assert "ai2d_test_ids.csv chooses 1 of AI2D's pictures" in found.notes

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({"rows": []}, "a layout that is not known: an object with the keys 'rows'"),
            ([1], "a layout that is not known: a list"),
            ({"data": []}, "a layout that is not known"),
            ({"data": [{"name": "x"}]}, "a layout that is not known"),
            ({"data": [{"questionId": 1, "question": "?", "image": "x.png"}]}, "there are no answers"),
            ({"data": [{"questionId": 1, "question": "?", "image": "x.png", "answers": [""]}]}, "are empty"),
            ({"data": [{"image_id": "x", "question": "?", "answers": ["a"]}]}, "question_id is missing"),
            ({"data": [{"image_id": "x", "question_id": 1, "question": "?", "answers": ["a"]}, 3]}, "data.1"),
            (
                {"imageName": "0.png", "questions": {"?": {"answerTexts": ["a"], "correctAnswer": 1}}},
                "0 to 0",
            ),
        ],
    )
    def test_what_is_malformed_is_named(self, tmp_path, value, message):
        with pytest.raises(DatasetError, match=message) as caught:
            opened(write_json(tmp_path / "odd.json", value))
        assert str(tmp_path / "odd.json") in caught.value.where

    def test_a_folder_that_is_no_dataset(self, tmp_path):
        with pytest.raises(DatasetError, match="a folder is read as AI2D"):
            opened(tmp_path)


class TestDemo:
    def test_held_out_pictures(self):
        found = opened("demo")
        assert (len(found.items), found.num_pictures, found.folder) == (200, 200, None)
        sample = held_out(3)[2]
        question = sample.questions[2]
        item = found.items[2]
        assert (item.question, item.answers) == (question.question, (question.answer,))
        assert np.array_equal(np.asarray(found.picture(item)), np.asarray(sample.image))
        assert len({item.question for item in found.items}) > 40

    def test_every_second_is_badly_taken(self):
        found = opened("demo", limit=2)
        clean = np.asarray(held_out(2)[1].image, np.float64)
        shown = np.asarray(found.picture(found.items[1]), np.float64)
        assert shown.shape == clean.shape
        assert 5 < np.abs(shown - clean).mean() < 60

    def test_it_is_always_the_same(self):
        assert (
            opened("demo", limit=5).sha256 == opened("demo", limit=5).sha256 != opened("demo", limit=6).sha256
        )

    def test_it_brings_its_pictures(self, tmp_path):
        with pytest.raises(DatasetError, match="the demo draws its pictures itself"):
            opened("demo", images=tmp_path)
