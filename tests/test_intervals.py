import statistics

import numpy as np
import pytest

from fastvlm_convert.intervals import MINIMUM, Interval, bootstrap, paired_bootstrap, too_few

RNG = np.random.default_rng(5)


def test_the_mean_of_many_values_has_the_interval_of_the_textbook():
    values = RNG.normal(3, 2, 400)
    error = statistics.stdev(values) / len(values) ** 0.5
    found = bootstrap(values)
    assert found.level == 0.95
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    narrow = bootstrap(values, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * error, rel=0.1)


def test_as_many_experiments_as_promised_hold_the_truth():
    repetitions = [bootstrap(RNG.random(60) < 0.7, resamples=300, seed=n) for n in range(200)]
    share = np.mean([found.low <= 0.7 <= found.high for found in repetitions])
    assert 0.9 <= share <= 0.98


def test_whole_clusters_are_drawn():
    """Twenty equal questions about a picture tell no more than one."""
    pictures = RNG.normal(size=100)
    values, clusters = np.repeat(pictures, 20), np.repeat(np.arange(100), 20)
    together, once = bootstrap(values, clusters=clusters), bootstrap(pictures)
    assert (together.low, together.high) == pytest.approx((once.low, once.high), rel=1e-12)
    apart = bootstrap(values)
    assert (apart.high - apart.low) * 4 < together.high - together.low


def test_larger_clusters_weigh_more():
    values = [1.0] * 9 + [0.0]
    clusters = ["large"] * 9 + ["small"]
    found = bootstrap(values, statistic=np.mean, clusters=clusters)
    assert (found.low, found.high) == (0, 1)  # either alone may be drawn
    centre = bootstrap(values, clusters=clusters, level=0.02)
    assert centre.low == centre.high == 0.9  # one of each


def test_any_statistic_of_arrays_of_any_shape():
    values = RNG.normal(size=(200, 3))
    found = bootstrap(values, statistic=lambda rows: float(np.median(rows[:, 2])), clusters=np.arange(200))
    assert found.low < np.median(values[:, 2]) < found.high
    mean = bootstrap(values[:, 0])
    same = bootstrap(values[:, 0], statistic=np.mean)
    assert (mean.low, mean.high) == pytest.approx((same.low, same.high), rel=1e-12)


def test_pairs_share_what_is_hard_about_an_item():
    hardness = RNG.normal(0, 10, 200)
    a, b = hardness + RNG.normal(0.5, 1, 200), hardness + RNG.normal(0, 1, 200)
    paired = paired_bootstrap(a, b)
    assert 0 < paired.low < 0.5 < paired.high
    apart = bootstrap(a)
    assert (paired.high - paired.low) * 4 < apart.high - apart.low
    by_function = paired_bootstrap(a, b, statistic=np.mean)
    assert by_function.low == pytest.approx(paired.low, rel=1e-9)
    p90 = paired_bootstrap(a, b, statistic=lambda values: float(np.quantile(values, 0.9)))
    assert p90.low < np.quantile(a, 0.9) - np.quantile(b, 0.9) < p90.high


def test_pairs_of_booleans_are_subtracted_as_numbers():
    a, b = np.array([True] * 30 + [False] * 20), np.array([False] * 50)
    found = paired_bootstrap(a, b)
    assert 0.4 < found.low < 0.6 < found.high < 0.8


def test_equal_seeds_give_equal_intervals():
    values = RNG.random(50)
    assert bootstrap(values, seed=3) == bootstrap(list(values), seed=3) != bootstrap(values, seed=4)
    assert bootstrap([2.0] * 40) == Interval(2.0, 2.0, 0.95)


def test_too_few_say_why():
    assert too_few(MINIMUM) is None
    assert too_few(12) == "no interval: 12 pictures, and fewer than 30 say too little about others"
    assert too_few(1).startswith("no interval: 1 picture, ")
    assert "12 texts" in too_few(12, "texts")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([]), "no values"),
        (lambda: bootstrap([1.0, 2.0], clusters=[1]), "2 values and 1 clusters"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "no pairs"),
        (lambda: bootstrap(np.zeros((3, 2))), "one number an observation"),
    ],
)
def test_what_is_no_sample_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
