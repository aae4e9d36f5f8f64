"""What candidates are compared with: answers to all questions, side by side, are those of one at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastvlm_convert.generate import greedy, teacher_forced
from fastvlm_convert.pictures import load_image
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import load_reference
from fastvlm_convert.verification.answers import Candidate, compare_answer
from fastvlm_convert.verification.layers import ReferenceValues
from fastvlm_convert.verification.reference_run import remembering, run_questions
from tests.bundles import open_bundle
from tests.checkpoints import LLAVA, golden_cases, golden_checkpoint

CASES = [case for case in golden_cases() if case.name == LLAVA]
QUESTIONS = [Question((load_image(case.image),), case.question) for case in CASES]


@pytest.fixture(scope="module")
def reference():
    return load_reference(golden_checkpoint(LLAVA))


def test_the_answers_are_the_original_codes(reference):
    shares: list[float] = []
    runs = run_questions(reference, QUESTIONS, 8, shares.append)
    assert [list(run.token_ids) for run in runs] == [list(case.greedy_token_ids[:8]) for case in CASES]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    for run in runs:
        stepwise = teacher_forced(reference.session, run.embeds, [*run.fed, 0])
        np.testing.assert_allclose(run.logits, stepwise, atol=2e-4)


def test_an_answer_ends_where_the_model_ends_it(reference):
    end = CASES[0].greedy_token_ids[5]
    ended = replace(reference, eos_token_ids=(end,))
    (run,) = run_questions(ended, QUESTIONS[:1], 8)
    said = list(CASES[0].greedy_token_ids[: list(CASES[0].greedy_token_ids).index(end)])
    assert (list(run.token_ids), run.finished, len(run.logits)) == (said, True, len(said) + 1)


def test_a_shorter_answer_is_what_asking_for_it_gives(reference):
    (long,), (short,) = (run_questions(reference, QUESTIONS[:1], n) for n in (8, 3))
    found = long.shortened(3)
    assert (found.token_ids, found.fed, found.finished) == (short.token_ids, short.fed, short.finished)
    np.testing.assert_allclose(found.logits, short.logits, atol=2e-4)
    assert long.shortened(9) is long


def test_tokens_that_the_logits_do_not_confirm_are_asked_once_more(reference, monkeypatch):
    """Side by side, the last bits of sums may decide otherwise between two tokens."""
    session = reference.session
    answers = session.greedy_answers
    monkeypatch.setattr(
        session, "greedy_answers", lambda *a: [([0] * 8, logits) for _, logits in answers(*a)]
    )
    runs = run_questions(reference, QUESTIONS, 8)
    assert [list(run.token_ids) for run in runs] == [list(case.greedy_token_ids[:8]) for case in CASES]


def test_a_picture_that_is_asked_about_again_is_encoded_once(reference):
    seen: list[torch.Tensor] = []
    hook = reference.session.model.vision.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model = remembering(reference)  # first: how the weights lie in memory decides the last bits
    try:
        plain = run_questions(reference, [*QUESTIONS, *QUESTIONS], 3)
        assert len(seen) == 2 * len(QUESTIONS)
        seen.clear()
        runs = [*run_questions(model, QUESTIONS, 3), *run_questions(model, QUESTIONS, 3)]
        assert len(seen) == len(QUESTIONS)
    finally:
        hook.remove()
    for run, other in zip(runs, plain, strict=True):
        np.testing.assert_array_equal(run.features[0], other.features[0])
        assert run.token_ids == other.token_ids


def test_a_prompt_that_is_known_is_read_once(reference):
    seen: list[int] = []
    layer = reference.session.model.decoder.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    try:
        model = remembering(reference)
        values = ReferenceValues(model, QUESTIONS[0])
        runs = run_questions(model, QUESTIONS, 3)
        forced = [model.session.teacher_forced(run.embeds, np.asarray(run.fed)) for run in runs]
        lengths = [len(run.embeds) for run in runs]
        assert [n for n in seen if n in lengths] == lengths
        seen.clear()
        values.again(model)  # watched, so that it is read whatever is known
        assert seen == lengths[:1]
    finally:
        hook.remove()
    for run, logits in zip(runs, forced, strict=True):
        np.testing.assert_array_equal(logits, run.logits)
        plain = reference.session.teacher_forced(run.embeds, np.asarray(run.fed))
        np.testing.assert_allclose(logits, plain, atol=2e-4)


def test_an_answer_that_is_known_is_not_asked_for_again(reference, fp32_bundle):
    candidate = open_bundle(fp32_bundle)
    (run,) = run_questions(reference, QUESTIONS[:1], 8)
    other = replace(run, token_ids=tuple((t + 1) % 100 for t in run.token_ids))
    known = [[5, 6, 7]]
    found = compare_answer(
        Candidate("onnx", candidate, known), QUESTIONS[0], 0, other, (run.embeds, run.logits)
    )
    assert found.first_difference == 0
    assert found.bundle_text == candidate.tokenizer.decode([5, 6, 7])


def test_a_candidate_that_parts_goes_on_from_there(reference, fp32_bundle):
    """As if it had been asked alone: what it was given up to there lies in its cache."""
    candidate = open_bundle(fp32_bundle)
    (run,) = run_questions(reference, QUESTIONS[:1], 8)
    other = (run.token_ids[3] + 1) % 100
    forced = replace(run, token_ids=(*run.token_ids[:3], other, *run.token_ids[4:]))
    forced = replace(forced, fed=forced.token_ids)
    logits = teacher_forced(candidate.session, run.embeds, [*forced.fed, 0])
    found = compare_answer(Candidate("onnx", candidate), QUESTIONS[0], 0, forced, (run.embeds, logits))
    assert found.first_difference == 3
    rows, alone = candidate.session.prefill(run.embeds), []
    for _ in range(9):
        alone.append(greedy(rows))
        rows = candidate.session.decode(candidate.session.embed(np.asarray(alone[-1:], np.int64)))
    ends = [n for n, token in enumerate(alone) if token in candidate.eos_token_ids]
    text = candidate.tokenizer.decode(alone[: ends[0]] if ends else alone)
    assert found.bundle_text == text
