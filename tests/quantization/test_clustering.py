"""k-means on lines against exhaustive clustering and a plain Lloyd that sorts."""

from itertools import combinations

import numpy as np
import pytest

from fastvlm_convert.quantization.clustering import kmeans


def clustering_error(points: np.ndarray, masses: np.ndarray, table: np.ndarray) -> float:
    """Squared error of the nearest values."""
    return float(masses @ np.square(points[:, None] - table.astype(np.float64)).min(1))


def least_error(points: np.ndarray, masses: np.ndarray, count: int) -> float:
    """Over all ways to cut sorted points into ranges."""
    order = np.argsort(points)
    points, masses = points[order].astype(np.float64), masses[order]
    least = np.inf
    for cuts in combinations(range(1, len(points)), count - 1):
        parts = np.split(np.arange(len(points)), cuts)
        means = np.array([np.average(points[part], weights=masses[part]) for part in parts])
        least = min(least, clustering_error(points, masses, means))
    return least


def plain_lloyd(points: np.ndarray, masses: np.ndarray, count: int) -> float:
    """Least error of Lloyd's algorithm from quantiles and from equal steps, 100 steps each."""
    ordered, least = np.sort(points), np.inf
    shares = (np.arange(count) + 0.5) / count
    for start in (np.quantile(points, shares), ordered[0] + shares * (ordered[-1] - ordered[0])):
        table = start
        for _ in range(100):
            nearest = np.searchsorted((table[1:] + table[:-1]) / 2, points)
            mass = np.bincount(nearest, masses, count)
            first = np.bincount(nearest, masses * points, count)
            table = np.sort(np.where(mass > 0, first / np.maximum(mass, 1e-30), table))
        least = min(least, clustering_error(points, masses, table.astype(np.float16)))
    return least


def test_near_the_best() -> None:
    ratios = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        points, masses = rng.standard_normal(14).astype(np.float32), rng.uniform(0.1, 1, 14)
        (table,), _ = kmeans(points[None], masses[None], 4)
        ratios.append(clustering_error(points, masses, table) / least_error(points, masses, 4))
    assert min(ratios) > 0.999
    assert np.median(ratios) < 1.05


SHAPES = {
    "smooth": lambda rng, n: rng.standard_normal(n),
    "heavy_tails": lambda rng, n: rng.standard_t(3, n),
    "outliers": lambda rng, n: rng.standard_normal(n) * np.where(rng.random(n) < 0.002, 100, 1),
    "one_sided": lambda rng, n: rng.gamma(2.0, size=n) + 3,
}


@pytest.mark.parametrize("count", [16, 64, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_sorting(shape, count) -> None:
    rng = np.random.default_rng(7)
    points = SHAPES[shape](rng, (3, 8000)).astype(np.float32)
    masses = rng.uniform(0.1, 1, points.shape)
    tables, _ = kmeans(points, masses, count)
    for line in range(len(points)):
        ours = clustering_error(points[line], masses[line], tables[line])
        assert ours <= 1.005 * plain_lloyd(points[line], masses[line], count)


def test_indices_are_those_of_the_nearest_values() -> None:
    rng = np.random.default_rng(1)
    points = (rng.standard_t(2, (40, 500)) * 10.0 ** rng.integers(-6, 3, (40, 1))).astype(np.float32)
    tables, indices = kmeans(points, np.ones(points.shape), 64)
    chosen = np.abs(points - np.take_along_axis(tables, indices.astype(int), 1))
    nearest = np.abs(points[..., None] - tables[:, None]).min(-1)
    np.testing.assert_allclose(chosen, nearest, rtol=1e-5, atol=1e-12)


def test_a_given_start_is_kept_where_it_is_the_best() -> None:
    start = np.array([[-2.0, -1.0, 1.0, 4.0]], np.float32)
    points = np.repeat(start, 50, axis=1)
    tables, _ = kmeans(points, np.ones(points.shape), 4, start)
    np.testing.assert_array_equal(tables, start)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-20])
def test_points_that_are_all_the_same(value) -> None:
    points = np.full((2, 300), value, np.float32)
    tables, indices = kmeans(points, np.ones(points.shape), 16)
    np.testing.assert_allclose(np.take_along_axis(tables, indices.astype(int), 1), points, atol=1e-7)


def test_points_without_mass_cost_nothing() -> None:
    points = np.concatenate([np.linspace(-1, 1, 16), np.linspace(50, 90, 400)]).astype(np.float32)[None]
    masses = np.where(points <= 1, 1.0, 0.0)
    tables, indices = kmeans(points, masses, 16)
    error = np.abs(points - np.take_along_axis(tables, indices.astype(int), 1))[0, :16]
    assert error.max() < 0.07


def test_by_hand() -> None:
    tables, indices = kmeans(np.array([[-3, -1, 3, 5]], np.float32), np.ones((1, 4)), 2)
    assert (tables.tolist(), indices.tolist()) == ([[-2, 4]], [[0, 0, 1, 1]])
