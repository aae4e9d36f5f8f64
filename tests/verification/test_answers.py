"""Answers in figures, computed here once more by hand."""

import numpy as np
import pytest

from fastvlm_convert.intervals import MINIMUM
from fastvlm_convert.verification.answers import Answer, figures_of


def answer(picture, kl, differing=(), number=0) -> Answer:
    first = differing[0] if differing else None
    return Answer(
        "onnx", "onnxruntime 1", picture, f"q{number}", "a", "a", first, tuple(kl), tuple(differing)
    )


def test_figures_of_few_pictures_have_no_interval_and_say_why():
    found = figures_of([answer("a", [0.0, 0.25]), answer("a", [1.0], [0]), answer(None, [0.75, 0.5])])
    assert (found.num_answers, found.num_pictures, found.num_tokens) == (3, 1, 5)
    assert (found.kl_mean_nats, found.kl_median_nats, found.kl_max_nats) == (0.5, 0.5, 1.0)
    assert found.kl_p99_nats == pytest.approx(np.quantile([0, 0.25, 1, 0.75, 0.5], 0.99))
    assert (found.top1_agreement, found.flips) == (0.8, pytest.approx(1 / 3))
    assert found.intervals == {}
    assert found.no_interval == "no interval: 1 picture, and fewer than 30 say too little about others"


def test_intervals_draw_whole_pictures():
    """Two answers about each picture, always alike: as if there were half as many independent ones."""
    kl = np.random.default_rng(1).exponential(size=MINIMUM)
    twice = [answer(f"{n}", [v], [0] if n % 3 == 0 else [], m) for n, v in enumerate(kl) for m in range(2)]
    once = twice[::2]
    apart = [
        answer(f"{n}", a.kl_nats, a.differing_tokens) for n, a in enumerate(twice)
    ]  # as if they were independent
    clustered, single, independent = (figures_of(found) for found in (twice, once, apart))
    for name in ("kl_mean_nats", "flips", "top1_agreement", "kl_median_nats", "kl_p99_nats"):
        interval = clustered.intervals[name]
        assert interval == single.intervals[name]
        assert interval.low <= getattr(clustered, name) <= interval.high
    width, narrow = (f.intervals["kl_mean_nats"].high - f.intervals["kl_mean_nats"].low
                     for f in (clustered, independent))  # fmt: skip
    assert narrow < 0.85 * width
    assert clustered.no_interval is None
    assert "kl_max_nats" not in clustered.intervals


def test_what_is_not_finite_has_no_figure():
    found = figures_of([answer(f"{n}", [None if n == 3 else 0.1]) for n in range(MINIMUM)])
    assert (found.kl_mean_nats, found.kl_median_nats, found.kl_max_nats) == (None, None, None)
    assert set(found.intervals) == {"top1_agreement", "flips"}
