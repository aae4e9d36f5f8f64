"""Whether pictures reach beyond those that calibrated, judged by the image tokens of the float model.

A Hessian says nothing about an input that no sample had: in channels that were always small, GPTQ is free to
put its errors. So the figure is the share of channels that other pictures drive beyond `FACTOR` times the
largest magnitude that calibration saw there. `LIMIT` lies between what pictures of the calibrated kind and of
others give on two trained checkpoints (docs/quality.md; benchmarks/calibration_coverage.py).
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fastvlm_convert.atomic_file import whole_file

FACTOR: Final = 1.5
LIMIT: Final = 0.3
_MOST: Final = 32  # pictures looked at: the maxima of many more are larger by their number alone


@dataclass(frozen=True)
class Coverage:
    """What layers were solved on.

    Attributes:
        ranges: The largest magnitude in each channel of the image tokens, float32 [hidden].
        num_pictures: Of how many pictures.
    """

    ranges: np.ndarray
    num_pictures: int


def coverage_of(features: np.ndarray) -> Coverage:
    """What some pictures cover.

    Args:
        features: Their image tokens, float32 [pictures, num_image_tokens, hidden]; none cover nothing.
    """
    return Coverage(_ranges(features), len(features))


def share_beyond(calibrated: Coverage, features: np.ndarray) -> float:
    """The share of channels that other pictures drive beyond `FACTOR` times the calibrated range.

    Args:
        calibrated: What layers were solved on.
        features: Image tokens of other pictures, float32 [pictures, num_image_tokens, hidden]. No more of
            them are looked at than calibrated, because a maximum grows with the number of pictures.
    """
    looked_at = max(1, min(calibrated.num_pictures, _MOST))
    return float(np.mean(_ranges(features[:looked_at]) > FACTOR * calibrated.ranges))


def coverage_warning(share: float) -> str | None:
    """What to tell a user of `share_beyond`; None where the pictures are covered."""
    if share <= LIMIT:
        return None
    return (
        "these pictures are very unlike those that the weights were calibrated with: they drive "
        f"{share:.0%} of the image tokens' channels beyond {FACTOR} times the largest value seen there; "
        "calibrate with some of the kind that the model will be shown (--calibration FOLDER)"
    )


def save_coverage(path: Path, coverage: Coverage) -> None:
    """Write a coverage, whole or not at all."""
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, ranges=coverage.ranges, num_pictures=coverage.num_pictures)


def load_coverage(path: Path) -> Coverage | None:
    """A coverage that was saved; None where there is none, or a damaged one."""
    try:
        with np.load(path) as arrays:
            return Coverage(arrays["ranges"], int(arrays["num_pictures"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _ranges(features: np.ndarray) -> np.ndarray:
    largest: np.ndarray = np.abs(features).max(axis=(0, 1), initial=0.0)
    return largest
