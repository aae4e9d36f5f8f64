import json
import shutil
from dataclasses import replace

import pytest

from fastvlm_convert.errors import BundleError, DatasetError, ImageError, PromptError, UsageError
from fastvlm_convert.evaluation.datasets import open_dataset
from fastvlm_convert.evaluation.journal import Answered, Binding, remove_journal
from fastvlm_convert.evaluation.models import bundle_hash, columns_of, open_column
from fastvlm_convert.evaluation.results import Settings, figures, item_results
from fastvlm_convert.evaluation.run import evaluate
from tests.bundles import copy_bundle
from tests.checkpoints import GOLDEN, LLAVA
from tests.evaluation.annotations import picture, write_lines

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
SHORT = Settings(max_new_tokens=3)


@pytest.fixture(autouse=True)
def _own_journals(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tmp_path):
    """Two questions about two pictures."""
    entries = []
    for color in ("red", "blue"):
        picture(tmp_path / "data" / f"{color}.png", color)
        entries.append({"id": color, "image": f"{color}.png", "question": "What?", "answers": [color]})
    return open_dataset(str(write_lines(tmp_path / "data" / "mine.jsonl", entries)))


def said(model, dataset, settings=SHORT):
    """What a model answers, asked without this package's help."""
    loaded = open_column(columns_of([model])[0], lambda share: None).loaded
    texts = []
    for item in dataset.items:
        question = "\n".join(filter(None, (item.question, settings.instruction)))
        stream = loaded.ask(dataset.folder / item.image, question, max_new_tokens=settings.max_new_tokens)
        stream.finish()
        texts.append(stream.text)
    return texts


def test_a_checkpoint_and_a_bundle_side_by_side(dataset, fp32_bundle):
    stages = []
    found, journals = evaluate(
        columns_of([CHECKPOINT, fp32_bundle]), dataset, SHORT, lambda *stage: stages.append(stage)
    )
    reference, bundle = found.models
    assert (reference.name, reference.target, reference.differences) == ("checkpoint", None, ())
    assert (bundle.name, bundle.target) == ("fp32 onnx", "onnx")
    assert reference.executed_by.startswith("torch")
    assert bundle.executed_by.startswith("onnxruntime")
    texts = said(CHECKPOINT, dataset)
    assert [[r.text for r in item.responses] for item in found.items] == [[text, text] for text in texts]
    assert found.num_differing == 0
    assert bundle.num_cut == sum(not item.responses[1].finished for item in found.items)
    answering = [share for stage, share in stages if stage == "answering"]
    assert answering == sorted(answering)
    assert answering[-1] == 1
    assert len(journals) == 2


def test_the_instruction_follows_every_question(dataset, fp32_bundle):
    settings = replace(SHORT, instruction="Answer in one word.")
    found, _ = evaluate(columns_of([fp32_bundle]), dataset, settings)
    texts = [item.responses[0].text for item in found.items]
    assert texts == said(fp32_bundle, dataset, settings)
    assert texts != said(fp32_bundle, dataset)


def test_what_was_answered_before_an_interruption_is_not_asked_again(dataset, fp32_bundle):
    columns = columns_of([fp32_bundle])
    seen = []

    def interrupt(stage: str, share: float) -> None:
        seen.append(stage)
        if stage == "answering" and share == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(columns, dataset, SHORT, interrupt)
    binding = Binding(
        bundle_hash(fp32_bundle), "onnx", open_column(columns[0], lambda s: None).loaded.session.executed_by,
        dataset.sha256, 3, None,
    )  # fmt: skip
    lines = binding.path.read_text().splitlines()
    assert [json.loads(line).get("id") for line in lines] == [None, "red"]
    shares = []
    found, journals = evaluate(columns, dataset, SHORT, lambda stage, share: shares.append((stage, share)))
    assert shares.count(("answering", 1.0)) == 1
    assert ("answering", 0.5) not in shares  # one question was left
    assert [item.responses[0].text for item in found.items] == said(fp32_bundle, dataset)
    assert found.warnings == (f"1 answers come from the journal of an interrupted run, {binding.path}",)
    for journal in journals:
        remove_journal(journal)
    assert evaluate(columns, dataset, SHORT)[0].warnings == ()


def test_a_bundle_that_has_changed_is_asked_anew(dataset, fp32_bundle, tmp_path):
    bundle = copy_bundle(fp32_bundle, tmp_path)
    evaluate(columns_of([bundle]), dataset, SHORT)
    assert evaluate(columns_of([bundle]), dataset, SHORT)[0].warnings
    card = bundle / "README.md"
    card.write_bytes(bytes(card.stat().st_size))  # which its manifest does not know
    assert evaluate(columns_of([bundle]), dataset, SHORT)[0].warnings == ()


def test_errors_say_at_which_question(dataset, fp32_bundle):
    columns = columns_of([fp32_bundle])
    with pytest.raises(PromptError, match="exceed the context") as caught:
        evaluate(columns, dataset, Settings(max_new_tokens=5000))
    assert caught.value.where == dataset.items[0].place
    (dataset.folder / "blue.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="not an image") as caught:
        evaluate(columns, dataset, SHORT)
    assert caught.value.where == f"{dataset.items[1].place}, {dataset.folder / 'blue.png'}"


def test_a_picture_that_has_gone(dataset, fp32_bundle):
    (dataset.folder / "blue.png").unlink()
    with pytest.raises(DatasetError, match="cannot read the picture"):
        evaluate(columns_of([fp32_bundle]), dataset, SHORT)


class TestColumns:
    def test_names_tell_models_apart(self, fp32_bundle, tmp_path):
        copy = shutil.copytree(fp32_bundle, tmp_path / "fp32")
        names = [column.name for column in columns_of([CHECKPOINT, fp32_bundle, copy])]
        assert names == ["checkpoint", f"{fp32_bundle} onnx", f"{copy} onnx"]

    def test_bad_ones(self, fp32_bundle):
        with pytest.raises(UsageError, match="is given twice"):
            columns_of([fp32_bundle, fp32_bundle / ".." / fp32_bundle.name])
        with pytest.raises(UsageError, match="there is no bundle"):
            columns_of([CHECKPOINT], ["onnx"])
        with pytest.raises(BundleError, match="no target 'coreml'"):
            columns_of([fp32_bundle], ["coreml"])


class TestFigures:
    @pytest.fixture
    def items(self):
        """Forty pictures of the demo; the first model is right about 30, the second about 24 of these."""
        dataset = open_dataset("demo", limit=40)
        right = {item.id: Answered(item.answers[0], True) for item in dataset.items}
        answers = [
            {
                name: answer if n < limit else Answered("no", False)
                for n, (name, answer) in enumerate(right.items())
            }
            for limit in (30, 24)
        ]
        return item_results(dataset, answers)

    def test_means_and_intervals(self, items):
        exact, vqa, anls = figures(items, 0)
        assert (exact.metric, exact.value, exact.num_items) == ("exact_match", 0.75, 40)
        assert 0.5 < exact.interval.low < 0.7 < 0.8 < exact.interval.high < 0.95
        assert (vqa.value, vqa.interval, vqa.num_items) == (None, None, 0)
        assert vqa.reason == "every question has fewer than 4 answers"
        assert anls.value >= exact.value

    def test_differences_are_paired(self, items):
        difference = figures(items, 1, against=0)[0]
        assert difference.value == pytest.approx(-0.15)
        assert -0.3 < difference.interval.low < -0.15 < difference.interval.high < 0

    def test_few_pictures_have_no_interval(self, items):
        exact = figures(items[:29], 0)[0]
        assert exact.value == 1
        assert exact.interval is None
        assert exact.reason == "no interval: 29 pictures, and fewer than 30 say too little about others"

    def test_questions_about_one_picture_are_one(self, items):
        alike = [replace(item, image="demo/0") for item in items]
        assert "1 picture," in figures(alike, 0)[0].reason

    def test_what_never_varies_has_no_interval(self, items):
        same = figures(items[:30], 0)[0]
        assert (same.value, same.interval) == (1, None)
        assert same.reason == "no interval where every question gives the same"
