from dataclasses import replace

import numpy as np
import pytest

from fastvlm_convert.errors import PromptError
from fastvlm_convert.generate import (
    Timings,
    answer_tokens,
    check_fits,
    generate,
    greedy,
    log_probability,
    sampler,
    teacher_forced,
)
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.prompt_cache import MemoryPromptCache
from fastvlm_convert.prompt_reading import embed_prompt

VOCAB, HIDDEN = 10, 3
EOS = (8, 9)


class Script:
    """A session that says a given sequence of tokens, and notes what it was given."""

    executed_by = "script"
    num_image_tokens = 2

    def __init__(self, tokens, context_length=100):
        self.context_length = context_length
        self.tokens = tokens
        self.calls = []
        self.fed = 0

    def encode_image(self, pixel_values):
        self.calls.append("encode_image")
        return np.full((self.num_image_tokens, HIDDEN), pixel_values.flat[0], np.float32)

    def embed(self, token_ids):
        assert token_ids.dtype == np.int64
        self.calls.append(("embed", token_ids.tolist()))
        return np.repeat(token_ids[:, None], HIDDEN, 1).astype(np.float32)

    def prefill(self, inputs_embeds):
        self.calls.append(("prefill", inputs_embeds[:, 0].tolist()))
        self.fed = 0
        return self.logits()

    def decode(self, inputs_embeds):
        assert inputs_embeds.shape == (1, HIDDEN)
        self.calls.append(("decode", inputs_embeds[0, 0]))
        self.fed += 1
        return self.logits()

    def logits(self):
        row = np.linspace(0, 0.9, VOCAB, dtype=np.float32)
        row[self.tokens[self.fed]] = 5
        return row


def prompt(*segments, images=()):
    pixels = tuple(np.full((1, 3, 4, 4), value, np.float32) for value in images)
    return Prompt(tuple(np.asarray(s, np.int64) for s in segments), pixels)


def test_the_answer_ends_before_any_end_token():
    for end in EOS:
        assert list(answer_tokens(Script([3, 1, 4, end, 7, 7]), prompt([1, 2]), EOS, 20)) == [3, 1, 4]
        session = Script([3, 1, 4, end, 7, 7])
        answer = generate(session, prompt([1, 2]), EOS, 20)
        assert answer.token_ids == (3, 1, 4)
        assert answer.finished
        assert answer.timings.answer_tokens == 4
        assert session.calls == [
            ("embed", [1, 2]), ("prefill", [1, 2]),
            ("embed", [3]), ("decode", 3), ("embed", [1]), ("decode", 1), ("embed", [4]), ("decode", 4),
        ]  # fmt: skip


def test_an_answer_that_is_nothing_but_the_end():
    answer = generate(Script([9]), prompt([1]), EOS, 5)
    assert (answer.token_ids, answer.finished) == ((), True)
    assert list(answer_tokens(Script([9]), prompt([1]), EOS, 5)) == []


def test_the_token_limit_ends_the_answer_without_a_step_too_many():
    session = Script([3, 1, 4, 1, 5])
    answer = generate(session, prompt([1]), EOS, 3)
    assert answer.token_ids == (3, 1, 4)
    assert not answer.finished
    assert [c for c in session.calls if c[0] == "decode"] == [("decode", 3), ("decode", 1)]
    assert generate(session, prompt([1]), EOS, 1).token_ids == (3,)


def test_the_end_token_may_come_at_the_limit():
    answer = generate(Script([3, 8]), prompt([1]), EOS, 2)
    assert (answer.token_ids, answer.finished) == ((3,), True)


def test_without_end_tokens_the_limit_ends_it():
    assert generate(Script([8, 9, 8]), prompt([1]), (), 3).token_ids == (8, 9, 8)


def test_tokens_come_as_they_are_made():
    session = Script([3, 1, 8])
    log = [(token, len(session.calls)) for token in answer_tokens(session, prompt([1]), EOS, 9)]
    assert log == [(3, 2), (1, 4)]  # the first right after the prefill


def test_what_does_not_fit_is_refused_before_anything_runs():
    question = prompt([1, 2, 3], [4], images=[0.5])  # six tokens
    session = Script([3] * 9, context_length=10)
    assert len(generate(session, question, (), 4).token_ids) == 4
    session.calls.clear()
    with pytest.raises(PromptError, match=r"prompt of 6 tokens and an answer of up to 5 exceed .* 10 tokens"):
        generate(session, question, (), 5)
    assert session.calls == []
    check_fits(6, 4, 10)
    with pytest.raises(PromptError):
        check_fits(7, 4, 10)


def test_image_features_stand_between_the_segments():
    session = Script([8])
    question = prompt([1, 2], [], [3], images=[0.25, 0.75])
    answer = generate(session, question, EOS, 1)
    assert ("prefill", [1, 2, 0.25, 0.25, 0.75, 0.75, 3]) in session.calls
    assert answer.timings.prompt_tokens == 7
    embedded = embed_prompt(session, question, [np.ones((2, HIDDEN)), np.zeros((2, HIDDEN))])
    assert embedded.shape == (7, HIDDEN)


def test_another_way_to_choose():
    assert generate(Script([3, 3]), prompt([1]), (), 2, choose=lambda row: int(np.argmin(row))).token_ids == (
        0,
        0,
    )


def test_timings_add_up():
    answer = generate(Script([3, 1, 4, 8]), prompt([1], [2], images=[1]), EOS, 9)
    timings = answer.timings
    assert min(timings.vision_s, timings.prefill_s, timings.decode_s) >= 0
    assert timings.ttft_s >= timings.vision_s + timings.prefill_s
    assert timings.decode_tokens_per_s == 3 / timings.decode_s
    assert replace(timings, answer_tokens=1).decode_tokens_per_s is None
    assert Timings(0, 0, 2.0, 0, 5, 5).decode_tokens_per_s == 2.0


class TestCache:
    """Of a runtime that takes a prompt whole; `tests/runtime` has one that begins in the middle."""

    def ask(self, question, cache, **options):
        session = Script([3, 8])
        tokens = answer_tokens(session, question, EOS, 9, cache=cache, **options)
        assert next(tokens) == 3
        with pytest.raises(StopIteration) as end:
            next(tokens)
        return session, end.value.value

    def test_a_picture_that_is_known_is_not_encoded(self):
        cache = MemoryPromptCache()
        found = []
        for images in ((0.5, 0.25), (0.25, 0.75), (0.75, 0.5)):
            session, answer = self.ask(prompt([1], [2], [3], images=images), cache)
            found.append((session.calls.count("encode_image"), answer.encoded_images))
            a, b = images
            assert ("prefill", [1, a, a, 2, b, b, 3]) in session.calls
            assert answer.cached_tokens == 0
        assert found == [(2, 2), (1, 1), (0, 0)]

    def test_without_a_cache_each_is(self):
        session, answer = self.ask(prompt([1], [2], images=[0.5]), None)
        assert (session.calls.count("encode_image"), answer.encoded_images) == (1, 1)

    def test_keys_that_are_given_are_taken(self):
        cache = MemoryPromptCache()
        cache.put_features("other", np.full((2, HIDDEN), 7, np.float32))
        question = prompt([1], [2], images=[0.5])
        session, answer = self.ask(question, cache, image_keys=["other"])
        assert ("prefill", [1, 7, 7, 2]) in session.calls
        assert answer.encoded_images == 0
        assert self.ask(question, cache)[1].encoded_images == 1

    def test_features_that_are_given_are_not_looked_up(self):
        features = [np.full((2, HIDDEN), 4, np.float32)]
        session, answer = self.ask(prompt([1], [2], images=[0.5]), MemoryPromptCache(), features=features)
        assert ("prefill", [1, 4, 4, 2]) in session.calls
        assert answer.encoded_images == 0


def test_log_probabilities_can_be_noted_while_tokens_are_chosen():
    noted = []

    def choose(logits):
        token = greedy(logits)
        noted.append(log_probability(logits, token))
        return token

    answer = generate(Script([3, 1, 8]), prompt([1]), EOS, 9, choose)
    assert answer.token_ids == (3, 1)
    script = Script([3, 1, 8])
    expected = []
    for script.fed, token in enumerate((3, 1, 8)):  # the end token was chosen, too
        logits = script.logits().astype(np.float64)
        expected.append(np.log(np.exp(logits[token]) / np.exp(logits).sum()))
    np.testing.assert_allclose(noted, expected, atol=1e-6)


def test_log_probabilities_of_huge_logits_are_finite():
    logits = np.array([6e4, -6e4, 6e4], np.float32)
    assert log_probability(logits, 0) == pytest.approx(np.log(0.5))
    assert log_probability(logits, 1) == pytest.approx(-1.2e5 + np.log(0.5))


def test_closing_ends_the_answer_between_tokens():
    session = Script([3, 1, 4, 1, 5])
    tokens = answer_tokens(session, prompt([1]), (), 5)
    assert [next(tokens), next(tokens)] == [3, 1]
    tokens.close()
    assert [c for c in session.calls if c[0] == "decode"] == [("decode", 3)]  # none is computed in vain
    assert generate(session, prompt([1]), (), 2).token_ids == (3, 1)  # and the session can be used again


def test_greedy_takes_the_first_of_equals():
    assert greedy(np.array([1.0, 3.0, 3.0])) == 1


# Sampling

LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.3, 0.05], np.float64)).astype(np.float32)


def draws(n, **settings):
    draw = sampler(**({"temperature": 1.0, "top_p": 1.0, "seed": 0} | settings))
    return [draw(LOGITS) for _ in range(n)]


def test_equal_seeds_draw_equal_tokens_and_others_do_not():
    assert draws(50, seed=4) == draws(50, seed=4)
    assert draws(50, seed=4) != draws(50, seed=5)


def test_frequencies_follow_the_probabilities():
    counts = np.bincount(draws(4000), minlength=5) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.5, 0.05, 0.3, 0.05], atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-6, {1}), (0.49, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.85, {0, 1, 3})]
)
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p, kept):
    assert set(draws(500, top_p=top_p)) == kept


def test_the_kept_set_is_normalised():
    counts = np.bincount(draws(4000, top_p=0.6), minlength=5) / 4000
    np.testing.assert_allclose(counts, [0, 0.625, 0, 0.375, 0], atol=0.03)


def test_temperature_sharpens_and_flattens():
    assert set(draws(300, temperature=0.02)) == {1}
    counts = np.bincount(draws(4000, temperature=100.0), minlength=5) / 4000
    np.testing.assert_allclose(counts, 0.2, atol=0.03)


def test_huge_logits_do_not_overflow():
    draw = sampler(1.0, 1.0, 0)
    with np.errstate(over="raise", invalid="raise"):
        assert draw(np.array([6e4, -6e4, 0], np.float32)) == 0


# Teacher forcing


def test_rows_are_the_logits_before_each_token():
    session = Script([3, 1, 4, 1])
    rows = teacher_forced(session, np.zeros((2, HIDDEN), np.float32), [7, 6, 5])
    assert rows.shape == (3, VOCAB)
    assert [int(np.argmax(row)) for row in rows] == [3, 1, 4]
    # What is fed are the given tokens, not what the model would have said; the last one needs no step.
    assert session.calls == [
        ("prefill", [0, 0]),
        ("embed", [7]),
        ("decode", 7),
        ("embed", [6]),
        ("decode", 6),
    ]
