"""The parts of the training that could be wrong without anyone noticing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.demo import make_sample
from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.scene import COLORS, SHAPES
from fastvlm_convert.demo.scene import WORDS as SIGNS
from fastvlm_convert.generate import generate
from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.model.session import TorchSession
from fastvlm_convert.prompt import build_prompt, user_message

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture(autouse=True)
def training_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))


@pytest.fixture
def tokenizer():
    from text import train_tokenizer

    return train_tokenizer(num_scenes=300)


def test_folding_keeps_the_features():
    from network import ConvNorm, NetworkConfig, Vision, fold

    torch.manual_seed(0)
    vision = Vision(NetworkConfig(widths=(8, 8, 16, 32, 32)))
    for module in vision.modules():
        if isinstance(module, ConvNorm):
            module.bn.running_mean.normal_(std=0.3)
            module.bn.running_var.uniform_(0.5, 2.0)
    vision.eval()
    pixels = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        before = vision(pixels)
        after = fold(vision)(pixels)
    assert not any(isinstance(module, ConvNorm) for module in vision.modules())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_packed_question_is_answered_as_if_alone(tokenizer):
    from data import attention_mask
    from network import Decoder, NetworkConfig
    from text import Packer

    torch.manual_seed(0)
    packer = Packer(tokenizer)
    config = NetworkConfig(vocab_size=tokenizer.get_vocab_size(), hidden=64, intermediate=64, layers=2)
    decoder = Decoder(config).eval()

    def hidden(questions):
        row, left = packer.pack(questions)
        ids, segments, positions = (
            torch.from_numpy(array)[None] for array in (row.ids, row.segments, row.positions)
        )
        with torch.no_grad():
            output = decoder(decoder.embed_tokens(ids), positions, attention_mask(segments))
        packed = len(questions) - len(left)
        return output[0][segments[0] == packed]

    questions = make_sample(3).questions[:3]
    torch.testing.assert_close(hidden(questions), hidden(questions[2:]), rtol=1e-4, atol=1e-5)


def test_a_row_asks_for_exactly_its_answers(tokenizer):
    from text import END, END_OF_TEXT, Packer

    packer = Packer(tokenizer)
    questions = make_sample(3).questions
    row, left = packer.pack(questions)
    packed = [question for question in questions if question not in left]
    assert packed
    for number, question in enumerate(packed, start=1):
        targets = row.targets[(row.segments == number) & (row.targets >= 0)]
        text = tokenizer.decode(targets.tolist(), skip_special_tokens=False)
        assert text == question.answer + END + END_OF_TEXT


def test_every_token_occurs_in_the_training_text(tokenizer):
    from data import TrainingStream
    from text import IGNORE, Packer, QuestionSource

    stream = TrainingStream(Packer(tokenizer), QuestionSource(tokenizer), seed=0)
    seen = set()
    for _ in range(60):
        batch = stream.next_batch(100, with_pixels=False)
        seen |= set(batch.ids[batch.segments != IGNORE].tolist()) | set(batch.targets.unique().tolist())
    assert set(range(tokenizer.get_vocab_size())) <= seen


def test_dense_labels_name_what_is_there():
    from labels import FIELDS, FIRST_TOKENS, token_labels

    fields = list(FIELDS)
    for seed in range(20):
        scene = make_sample(seed).scene
        labels = token_labels(scene)
        assert labels.shape == (16, len(fields))
        for place, token in enumerate(FIRST_TOKENS):
            index = labels[token, fields.index("shape")]
            name = scene.shapes[place].name if place in scene.shapes else ""
            assert FIELDS["shape"][index] == name


def test_a_boards_labels_say_what_its_report_says():
    from unseen.board import FIELDS, make_board, token_labels
    from unseen.questions import ask

    fields = list(FIELDS)
    for seed in range(40):
        board = make_board(Draw(seed))
        labels = token_labels(board)
        report = ask(board, "report", Draw(0)).answer
        for field in ("weave", "dye", "icon", "direction", "trend"):
            told = {FIELDS[field][index] for index in labels[:, fields.index(field)]} - {""}
            assert all(value in report for value in told)
        letters = "".join(FIELDS["letter"][index] for index in labels[:, fields.index("letter")])
        assert letters in report
        rows = {FIELDS["row"][index] for index in labels[:, fields.index("row")]} - {""}
        assert rows == {"one", "two", "three", "four"} if board.width == board.height else {"one", "two"}


def test_the_unseen_style_shares_no_thing_with_the_demos():
    from unseen.board import DYES, ICONS, WORDS

    assert not set(WORDS) & set(SIGNS)
    assert not set(ICONS) & set(SHAPES)
    assert not set(DYES) & set(COLORS)


def test_boards_differ_by_seed_alone():
    from unseen.board import make_board
    from unseen.drawing import draw_board

    pictures = [np.asarray(draw_board(make_board(Draw(seed)))) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert pictures[2].shape != pictures[0].shape or not np.array_equal(pictures[2], pictures[0])


def test_the_unseen_checkpoint_answers_about_boards_that_training_never_drew():
    from unseen.board import make_board
    from unseen.drawing import draw_board
    from unseen.questions import KINDS, ask

    checkpoint = open_checkpoint(TRAINING / "unseen" / "checkpoint")
    session = TorchSession(load_model(checkpoint.config, checkpoint.weights), 256)
    right = []
    for seed in range(4_000_000_000, 4_000_000_008):
        draw = Draw(seed)
        board = make_board(draw)
        image = draw_board(board)
        for question in filter(None, (ask(board, kind, draw) for kind in KINDS)):
            message, settings = user_message(question.question, [image]), checkpoint.pictures.image
            prompt = build_prompt([message], checkpoint.prompt.format, checkpoint.tokenizer, settings)
            said = generate(session, prompt, checkpoint.eos_token_ids, 80)
            right.append(checkpoint.tokenizer.decode(said.token_ids) == question.answer)
    assert len(right) > 60
    assert np.mean(right) > 0.97
