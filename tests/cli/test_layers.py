"""The lines that say what integers do to the answers, and what documents say of it."""

from fastvlm_convert.cli.layers import score_facts, score_text
from fastvlm_convert.quantization.score import Agreement, AnswerScore

PICTURES, TEXTS = Agreement(0.03, 0.975, 200, 6), Agreement(0.1, 0.85, 600, 10)
BOTH = AnswerScore(Agreement(0.0825, 0.88125, 800, 16), True, PICTURES, TEXTS)


def test_pictures_and_text_are_told_apart():
    assert score_text(BOTH).splitlines() == [
        "answers: KL 0.083 nats, same top token in 88.12 % of 800 tokens of 16 calibration samples held out",
        "  6 with pictures: KL 0.03 nats, same top token in 97.50 % of 200 tokens",
        "  10 of text alone: KL 0.1 nats, same top token in 85.00 % of 600 tokens",
    ]
    facts = score_facts(BOTH)
    assert (facts.kl_mean_nats, facts.num_held_out, facts.with_pictures) == (0.0825, 16, PICTURES)


def test_of_one_kind_the_total_says_it_all():
    assert score_text(AnswerScore(TEXTS, False, None, TEXTS)) == (
        "answers: KL 0.1 nats, same top token in 85.00 % of 600 tokens of the one sample that layers were "
        "solved with"
    )
    assert score_facts(AnswerScore(TEXTS, False, None, TEXTS)).num_held_out == 0
