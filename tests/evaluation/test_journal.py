import json
from dataclasses import replace

import pytest

from fastvlm_convert.errors import ConversionError
from fastvlm_convert.evaluation.journal import Answered, Binding, open_journal, remove_journal

BINDING = Binding(
    model_sha256="aa", target="onnx", executed_by="onnxruntime 1", dataset_sha256="bb", max_new_tokens=None,
    instruction=None,
)  # fmt: skip
ANSWERS = {"1": Answered("red\n\u2028\x00", True), "two": Answered("", False), "3": Answered("x", True)}


@pytest.fixture(autouse=True)
def _own_journals(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path():
    """A journal with three answers."""
    with open_journal(BINDING) as journal:
        for name, answer in ANSWERS.items():
            journal.add(name, answer)
    return BINDING.path


def reopened():
    with open_journal(BINDING) as journal:
        return journal


def test_answers_are_there_again(path):
    journal = reopened()
    assert journal.answers == ANSWERS
    assert journal.notes == (f"3 answers come from the journal of an interrupted run, {path}",)


def test_an_answer_outlives_the_process_at_once():
    with open_journal(BINDING) as journal:
        journal.add("1", ANSWERS["1"])
        assert len(BINDING.path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"model_sha256": "x"}, {"target": "coreml"}, {"executed_by": "x"}, {"dataset_sha256": "x"},
        {"max_new_tokens": 3}, {"instruction": "x"}, {"method": 9},
    ],
)  # fmt: skip
def test_it_is_bound_to_everything_that_answers_depend_on(path, change):
    with open_journal(replace(BINDING, **change)) as other:
        assert other.answers == {}
    assert reopened().answers == ANSWERS


def test_another_journal_under_its_name_is_begun_anew(path):
    with open_journal(replace(BINDING, model_sha256="x")) as other:
        other.add("1", Answered("wrong", True))
    path.write_bytes(other.path.read_bytes())
    journal = reopened()
    assert journal.answers == {}
    assert "is not of this evaluation (line 1) and is begun anew" in journal.notes[0]


@pytest.mark.parametrize(
    ("damage", "lost", "line"),
    [
        (lambda lines: [*lines[:3], lines[3][:-9]], "3", 4),  # cut short, as by a crash
        (lambda lines: [*lines[:2], lines[2].replace("false", "true"), lines[3]], "two", 3),
        (lambda lines: [lines[0], lines[1].replace("red", "bed"), *lines[2:]], "1", 2),
        (lambda lines: [lines[0], "[]", *lines[2:]], "1", 2),
        (lambda lines: [lines[0], "\x00\x00\x00", *lines[2:]], "1", 2),
    ],
)
def test_a_damaged_line_is_asked_again(path, damage, lost, line):
    path.write_text("\n".join(damage(path.read_text().split("\n")[:4])))
    journal = reopened()
    assert journal.answers == {name: answer for name, answer in ANSWERS.items() if name != lost}
    assert journal.notes[-1] == f"damaged lines of {path} are left out, their questions asked again: {line}"
    with open_journal(BINDING) as again:  # the damage is gone, and what is added is not hurt by it
        assert len(again.notes) == 1
        again.add(lost, ANSWERS[lost])
    assert reopened().answers == ANSWERS


def test_every_line_says_nothing_of_the_host(path):
    assert all(json.loads(line)["checksum"] for line in path.read_text().splitlines())
    assert str(path.parent) not in path.read_text()


def test_bytes_that_are_no_text(path):
    path.write_bytes(b"\xff\xfe\xfa" + path.read_bytes())
    journal = reopened()
    assert journal.answers == {}
    assert len(journal.notes) == 1


def test_two_runs_at_once(path):
    with (
        open_journal(BINDING),
        pytest.raises(ConversionError, match="is being evaluated on these questions already"),
        open_journal(BINDING),
    ):
        pass


def test_without_a_place_for_it(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "file"))
    with open_journal(BINDING) as journal:
        journal.add("1", ANSWERS["1"])
    assert journal.answers == {"1": ANSWERS["1"]}
    assert "no journal can be kept" in journal.notes[0]
    assert journal.path is None


def test_it_is_removed(path):
    remove_journal(path)
    assert list(path.parent.iterdir()) == []
