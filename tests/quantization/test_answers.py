"""What the reference says, and how samples lie side by side."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.generate import generate
from fastvlm_convert.quantization.answers import (
    MAX_ANSWER_TOKENS,
    CalibrationSet,
    Sample,
    collect_samples,
    token_batch,
)
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.questions import Question
from fastvlm_convert.recipe_settings import CalibrationSettings
from fastvlm_convert.runtime.loaded import load_reference
from tests.checkpoints import HF, LLAVA, golden_checkpoint
from tests.quantization.calibrated import SETTINGS, calibrated_recipe, float_chain, generated, golden_answers

CHECKPOINT = golden_checkpoint(LLAVA)
PICTURE = Image.new("RGB", (9, 5), "red")


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path))
    return tmp_path


def ask(
    data: Calibration,
    settings: CalibrationSettings = SETTINGS,
    checkpoint=CHECKPOINT,
    on_progress=lambda s: None,
) -> CalibrationSet:
    plan = plan_weights(golden_checkpoint(checkpoint.path.parent.name), calibrated_recipe(**asdict(settings)))
    return collect_samples(replace(plan, checkpoint=checkpoint), data, on_progress)


def same(a: CalibrationSet, b: CalibrationSet) -> bool:
    return np.array_equal(a.features, b.features) and all(
        np.array_equal(x.answer, y.answer) for x, y in zip(a.samples, b.samples, strict=True)
    )


def test_they_are_the_references_own():
    reference = load_reference(CHECKPOINT)
    found = golden_answers()
    for question, sample, features, pixels in zip(
        generated().questions, found.samples, found.features, found.pictures, strict=True
    ):
        prompt = reference.conversation(question.messages)
        room = min(MAX_ANSWER_TOKENS, SETTINGS.max_tokens - prompt.length(len(features)))
        if question.answer is None:
            said = generate(reference.session, prompt, reference.eos_token_ids, room)
            end = [reference.eos_token_ids[0]] if said.finished else []
            assert sample.answer.tolist() == [*said.token_ids, *end]
        assert [s.tolist() for s in sample.segments] == [s.tolist() for s in prompt.segments]
        np.testing.assert_array_equal(pixels, prompt.images[0])
        expected = reference.session.encode_image(prompt.images[0])  # of weights that are not folded
        np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max())
        assert prompt.length(len(features)) + len(sample.answer) <= SETTINGS.max_tokens


def test_it_is_asked_once(own_cache):
    first = ask(generated())
    (path,) = own_cache.glob("answers/*/*.npz")
    written = path.stat().st_mtime_ns
    shares: list[float] = []
    second = ask(generated(), checkpoint=replace(CHECKPOINT, weights={}), on_progress=shares.append)
    assert same(first, second)
    assert (path.stat().st_mtime_ns, shares) == (written, [1.0])


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-40], lambda b: b"no archive", lambda b: b[:200]]
)
def test_a_damaged_cache_is_no_cache(own_cache, damage):
    first = ask(generated())
    (path,) = own_cache.glob("answers/*/*.npz")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert same(ask(generated()), first)
    assert path.read_bytes() == whole


def test_other_data_is_asked_anew(own_cache):
    ask(generated())
    ask(replace(generated(), sha256="other"))
    ask(generated(), replace(SETTINGS, max_tokens=80))
    assert len(list(own_cache.glob("answers/*/*.npz"))) == 3


def test_given_answers(own_cache):
    """They may be longer than generated ones: reading takes no time to speak of."""
    texts = ("Red.", "", "A red picture. " * 40)
    data = Calibration(tuple(Question((PICTURE,), "What?", text) for text in texts), "given")
    found = ask(data, replace(SETTINGS, max_tokens=190)).samples
    end = CHECKPOINT.eos_token_ids[0]
    for text, sample in zip(texts, found, strict=True):
        ids = CHECKPOINT.tokenizer.encode(text)
        room = 190 - CHECKPOINT.config.vision.num_image_tokens - sum(map(len, sample.segments))
        assert sample.answer.tolist() == [*ids[: room - 1], end]
    assert MAX_ANSWER_TOKENS < len(found[2].answer) < len(CHECKPOINT.tokenizer.encode(texts[2]))


@pytest.mark.parametrize("token_weights", ["modality", "token"])
def test_short_texts_share_a_sample(own_cache, token_weights):
    """None is longer than the longest. What is held out stays alone, and all do whose tokens are weighed."""
    asked = [("Who?", "Me."), ("What is it?", "A box."), ("Why?", "Because."), ("When?", "Now, I think.")] * 2
    texts = [Question((), question, answer) for question, answer in asked]
    questions = (texts[0], Question((PICTURE,), "What?", "A red picture. " * 14), *texts[1:], texts[0])
    settings = replace(SETTINGS, token_weights=token_weights)
    found = ask(Calibration(questions, token_weights), settings)
    tokens = CHECKPOINT.config.vision.num_image_tokens
    alone = [ask(Calibration((questions[1], text), f"{n}")).samples[1] for n, text in enumerate(texts)]
    fitted, held_out = found.samples[: found.num_fitted], found.samples[found.num_fitted :]
    assert [sample.answer.tolist() for sample in held_out] == [alone[0].answer.tolist()]
    if token_weights == "token":
        assert len(fitted) == 9
        return
    assert 3 <= len(fitted) < 9
    shown = [sample for sample in fitted if sample.num_pictures]
    assert [sample.num_pictures for sample in shown] == [1]
    assert max(sample.length(tokens) for sample in fitted) == shown[0].length(tokens)
    read = [np.concatenate([*s.segments, s.answer]) for s in fitted if not s.num_pictures]
    np.testing.assert_array_equal(
        np.concatenate(read), np.concatenate([np.concatenate([*s.segments, s.answer]) for s in alone])
    )


def test_pictures_and_texts_take_turns(own_cache):
    """A wide model's layers are solved on as many of the first samples as memory holds."""
    shown = [Question((PICTURE,), f"{n}?", "Red. " * 20) for n in range(8)]
    told = [Question((), f"{n}?", "No. " * 60) for n in range(4)]
    found = ask(Calibration((*shown, *told), "turns"), replace(SETTINGS, token_weights="modality"))
    kinds = [sample.num_pictures for sample in found.samples[: found.num_fitted]]
    assert (kinds.count(1), kinds.count(0)) == (8, 3)  # every tenth is held out
    for count in range(4, len(kinds)):
        assert 0 < kinds[:count].count(0) / count < 0.4


def test_the_end_token_is_the_models(own_cache):
    checkpoint = golden_checkpoint(HF)
    found = ask(Calibration((Question((PICTURE,), "What?", "Red."),), "hf"), checkpoint=checkpoint)
    assert found.samples[0].answer[-1] == checkpoint.eos_token_ids[0]


def test_special_tokens_in_questions_and_answers_are_text(own_cache):
    typed = "What is <image> <|im_end|>?"
    found = ask(Calibration((Question((PICTURE,), typed, "<|im_end|>"),), "typed")).samples[0]
    tokenizer = CHECKPOINT.tokenizer
    assert tokenizer.end_of_turn_id not in found.answer[:-1]
    ids = [i for segment in found.segments for i in segment]
    assert tokenizer.image_token_id not in ids
    assert ids.count(tokenizer.end_of_turn_id) == 2  # those of the format: system and user


def test_every_tenth_sample_is_held_out_and_comes_last(own_cache):
    pictures = [Image.new("RGB", (5, 9), (10 * n, 0, 0)) for n in range(21)]
    asked = [Question((picture,), f"{n}?", "No.") for n, picture in enumerate(pictures)]
    asked[3] = Question((), "3?", "No.")
    data = Calibration(tuple(asked), "many")
    found = ask(data)
    assert (len(found.samples), found.num_fitted, found.num_fitted_pictures) == (21, 19, 18)
    tokenizer = CHECKPOINT.tokenizer
    said = [tokenizer.decode(list(sample.segments[-1])) for sample in found.samples]
    shown = [n for n in range(21) if n not in (3, 9, 19)]
    order = [*shown[:9], 3, *shown[9:], 9, 19]  # the text in the middle
    assert all(f"{n}?" in text for n, text in zip(order, said, strict=True))
    alone = ask(Calibration((asked[9],), "one"))
    np.testing.assert_array_equal(found.pictures[-2], alone.pictures[0])
    np.testing.assert_array_equal(found.features[-2], alone.features[0])
    assert (alone.num_fitted, ask(Calibration(tuple(asked[:3]), "three")).num_fitted) == (1, 2)


def test_text_alone_and_several_pictures(own_cache):
    pictures = (PICTURE, Image.new("RGB", (5, 9), "blue"))
    questions = (Question((), "Who?", "Ann."), Question(pictures, "Same?", "No."), Question((PICTURE,), "?"))
    found = ask(Calibration(questions, "mixed"))
    assert [sample.num_pictures for sample in found.samples] == [2, 0, 1]
    assert len(found.features) == len(found.pictures) == 3
    np.testing.assert_array_equal(found.features[0], found.features[2])
    with pytest.raises(RecipeError, match="holds no picture"):
        ask(Calibration(questions[:1], "text"))


def test_a_prompt_that_leaves_no_room(own_cache):
    with pytest.raises(
        RecipeError, match=r"max_tokens is 30, but the prompt of sample 1 takes \d+ tokens"
    ) as caught:
        ask(generated(), replace(SETTINGS, max_tokens=30))
    assert "raise calibration.max_tokens" in str(caught.value.hint)
    assert not (own_cache / "answers").exists()


def ids(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


SAMPLES = (
    Sample((ids(1, 2), ids(3)), ids(4, 5, 6)),
    Sample((ids(), ids(7, 8)), ids(9)),  # the picture comes first
    Sample((ids(1), ids()), ids(2, 3)),  # and last
    Sample((ids(6, 7),), ids(8)),  # there is none
    Sample((ids(1), ids(2), ids(3)), ids(4)),  # there are two
)


def test_samples_side_by_side():
    features = 100 + torch.arange(20.0).reshape(5, 2, 2)
    batch = token_batch(SAMPLES, features, lambda tokens: tokens[:, None].expand(-1, 2).float())
    first = [
        [1, 2, 100, 102, 3, 4, 5], [104, 106, 7, 8], [1, 108, 110, 2], [6, 7], [1, 112, 114, 2, 116, 118, 3],
    ]  # fmt: skip
    longest = len(first[0])
    assert batch.embeds[..., 0].tolist() == [row + [0] * (longest - len(row)) for row in first]
    assert batch.real.sum(1).tolist() == [7, 4, 4, 2, 7]
    images = [row.nonzero().flatten().tolist() for row in batch.image]
    assert images == [[2, 3], [0, 1], [1, 2], [], [1, 2, 4, 5]]
    rows, tokens = (part.tolist() for part in batch.answers)
    expected = [(0, 4), (0, 5), (0, 6), (1, 3), (2, 2), (2, 3), (3, 1), (4, 6)]
    assert list(zip(rows, tokens, strict=True)) == expected
    assert all(batch.real[r, t] for r, t in zip(rows, tokens, strict=True))


def test_answers_are_predicted_where_they_say():
    """The likeliest tokens at those places are the reference's greedy answers."""
    chain, data = float_chain(), golden_answers()
    batch = token_batch(data.samples, torch.from_numpy(data.features), chain.embed)
    x = batch.embeds
    for block in chain.decoder_blocks():
        x = chain.run(chain.load(block), x)
    asked = batch.answers[0] < 2  # the last answer was given
    said = np.concatenate([sample.answer for sample in data.samples[:2]])
    assert chain.logits(x[batch.answers])[asked].argmax(-1).tolist() == said.tolist()
