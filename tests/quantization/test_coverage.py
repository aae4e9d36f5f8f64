"""Whether pictures reach beyond those that calibrated: the figure, its limit, and its file."""

import numpy as np
import pytest

from fastvlm_convert.quantization.coverage import (
    FACTOR,
    LIMIT,
    coverage_of,
    coverage_warning,
    load_coverage,
    save_coverage,
    share_beyond,
)


def tokens(*scales: float, hidden: int = 20) -> np.ndarray:
    """Image tokens of pictures, the largest of each channel a scale; float32 [pictures, 3, hidden]."""
    base = np.array([0.5, -1.0, 0.2], np.float32)[:, None] * np.ones(hidden, np.float32)
    return np.stack([np.float32(scale) * base for scale in scales])


def test_the_share_of_channels_beyond():
    calibrated = coverage_of(tokens(1.0, 2.0))
    assert calibrated.num_pictures == 2
    np.testing.assert_array_equal(calibrated.ranges, np.full(20, 2, np.float32))
    seen = tokens(2.0)
    seen[0, 1, :7] *= -1.01 * FACTOR
    assert share_beyond(calibrated, seen) == 7 / 20
    assert share_beyond(calibrated, 0.98 * FACTOR * tokens(2.0)) == 0


def test_no_more_pictures_are_looked_at_than_calibrated():
    """The maximum of many would be larger by their number alone."""
    assert share_beyond(coverage_of(tokens(1.0, 1.0)), tokens(1.0, 1.0, 9.0)) == 0
    assert share_beyond(coverage_of(tokens(1.0, 1.0, 1.0)), tokens(1.0, 1.0, 9.0)) == 1
    assert share_beyond(coverage_of(tokens(*[1.0] * 40)), tokens(*[1.0] * 33, 9.0)) == 0


def test_without_pictures_nothing_is_covered():
    assert share_beyond(coverage_of(tokens(1.0)[:0]), tokens(1.0)) == 1


def test_a_warning_beyond_the_limit_only():
    assert coverage_warning(LIMIT) is None
    assert "they drive 46% of" in str(coverage_warning(0.46))


@pytest.mark.parametrize("damage", [b"", b"PK", None])
def test_its_file(tmp_path, damage):
    path = tmp_path / "coverage.npz"
    assert load_coverage(path) is None
    save_coverage(path, coverage_of(tokens(3.0)))
    found = load_coverage(path)
    np.testing.assert_array_equal(found.ranges, np.full(20, 3, np.float32))
    assert found.num_pictures == 1
    path.write_bytes(path.read_bytes()[:90] if damage is None else damage)
    assert load_coverage(path) is None
