"""The parts of the training that could be wrong without anyone noticing."""

from pathlib import Path

import pytest
import torch

from fastvlm_convert.demo import make_sample

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
