"""Answers side by side, against the reference's one decode loop."""

import numpy as np
import torch

from fastvlm_convert.model import batch
from fastvlm_convert.model.batch import answers_with_logits, greedy_answers
from fastvlm_convert.model.session import TorchSession
from tests.checkpoints import LLAVA, golden_model

LENGTHS = (7, 1, 40, 23, 12)
LIMITS = (9, 20, 1, 12, 20)


def one_by_one(prompts: list[torch.Tensor], eos: tuple[int, ...]) -> list[list[int]]:
    answers = []
    for prompt, limit in zip(prompts, LIMITS, strict=True):
        session = TorchSession(golden_model(LLAVA, folded=True), 80)
        said = [int(session.prefill(prompt.numpy()).argmax())]
        while len(said) < limit and said[-1] not in eos:
            said.append(int(session.decode(session.embed(np.asarray(said[-1:]))).argmax()))
        answers.append(said)
    return answers


def test_answers_are_those_of_one_prompt_after_the_other(monkeypatch):
    decoder = golden_model(LLAVA, folded=True).decoder
    rng = torch.Generator().manual_seed(3)
    ids = [torch.randint(decoder.config.vocab_size, (n,), generator=rng) for n in LENGTHS]
    prompts = [decoder.embed_tokens(row).detach() for row in ids]
    endless = one_by_one(prompts, ())
    eos = (endless[1][5], endless[4][2])  # so that some rows end early
    expected = one_by_one(prompts, eos)
    assert [len(row) for row in endless] == list(LIMITS) != [len(row) for row in expected]
    for rows in (32, 2):
        monkeypatch.setattr(batch, "ROWS", rows)
        shares: list[float] = []
        assert greedy_answers(decoder, prompts, LIMITS, eos, shares.append) == expected
        assert (shares, shares[-1]) == (sorted(shares), 1.0)
    assert greedy_answers(decoder, [], [], eos) == []


def test_logits_are_those_of_one_pass():
    """After the prompt and each token but the end; of an answer that is an end token alone, after that."""
    model = golden_model(LLAVA, folded=True)
    rng = torch.Generator().manual_seed(3)
    ids = [torch.randint(model.decoder.config.vocab_size, (n,), generator=rng) for n in LENGTHS]
    prompts = [model.decoder.embed_tokens(row).detach() for row in ids]
    endless = one_by_one(prompts, ())
    eos = (endless[1][5], endless[4][0])
    found = answers_with_logits(model.decoder, prompts, LIMITS, eos)
    assert [said for said, _ in found] == one_by_one(prompts, eos)
    assert found[4][0] == [endless[4][0]]
    for prompt, (said, logits) in zip(prompts, found, strict=True):
        fed = [token for token in said if token not in eos] or said
        expected = TorchSession(model, 80).teacher_forced(prompt.numpy(), np.asarray(fed))
        np.testing.assert_allclose(logits.numpy(), expected, atol=2e-4)
