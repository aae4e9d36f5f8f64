"""Guesses of what an answer goes on with, and that they change nothing but the number of steps."""

import pytest
import torch

from fastvlm_convert.model.batch import answers_with_logits
from fastvlm_convert.model.guesses import guessed_tokens
from tests.checkpoints import LLAVA, golden_model

LIMIT = 12


@pytest.mark.parametrize(
    ("said", "hint", "count", "expected"),
    [
        ([5], [5, 6, 7, 8], 2, [6, 7]),
        ([1, 2, 3, 9, 2, 3], [], 5, [9, 2, 3, 9, 2]),  # what repeats itself goes on
        ([7, 7], [], 3, [7, 7, 7]),
        ([1, 2, 8, 2], [4, 1, 2, 7], 1, [8]),  # one token alone: the latest place
        ([8, 1, 2], [1, 2, 7, 3, 2, 6], 2, [7, 3]),  # two tokens count for more than a later one
        ([3], [1, 2, 3], 5, []),  # nothing follows the hint's end
        ([1], [4, 1, 5], 5, [5]),  # the answer does not follow the hint
        ([1], [], 3, []),
    ],
)
def test_what_followed_the_last_tokens_is_guessed(said, hint, count, expected):
    assert guessed_tokens(said, hint, count) == expected


def answered(model, prompts, hints):
    """Answers with logits, and how many steps led to them."""
    steps = []
    embedding = model.decoder.embed_tokens
    hook = embedding.register_forward_hook(lambda _m, given, _y: steps.append(given[0].shape))
    try:
        found = answers_with_logits(model.decoder, prompts, [LIMIT] * len(prompts), (), hints=hints)
    finally:
        hook.remove()
    return found, len(steps) - len(prompts)  # each answer is read once more


@pytest.mark.parametrize("count", [1, 3, 32])
def test_right_guesses_save_steps_and_wrong_ones_change_nothing(count):
    model = golden_model(LLAVA, folded=True)
    rng = torch.Generator().manual_seed(3)
    shape = (count, 9)
    ids = torch.randint(model.decoder.config.vocab_size, shape, generator=rng)
    prompts = list(model.decoder.embed_tokens(ids).detach())
    plain, _ = answered(model, prompts, None)
    said = [ids for ids, _ in plain]
    wrong = [[token + 1 for token in ids] for ids in said]
    found_wrong, many = answered(model, prompts, wrong)
    found_right, few = answered(model, prompts, said)
    for found in (found_wrong, found_right):
        assert [ids for ids, _ in found] == said
        for (_, logits), (_, expected) in zip(found, plain, strict=True):
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert few == many if count == 32 else few < many  # so many rows have no room for guesses


def test_a_row_that_is_guessed_waits_for_one_that_is_not():
    """It has ended long before the other, and its cache has no room for more."""
    model = golden_model(LLAVA, folded=True)
    lengths, rng = (9, 4), torch.Generator().manual_seed(3)
    ids = [torch.randint(model.decoder.config.vocab_size, (length,), generator=rng) for length in lengths]
    prompts, limits = [model.decoder.embed_tokens(row).detach() for row in ids], [60, 60]
    plain = answers_with_logits(model.decoder, prompts, limits, ())
    said = [ids for ids, _ in plain]
    found = answers_with_logits(model.decoder, prompts, limits, (), hints=[said[0], ()])
    assert [ids for ids, _ in found] == said
