"""Whether pictures reach beyond those that calibrated, judged by the image tokens of the float model.

A Hessian says nothing about an input that no sample had: in channels that were always small, GPTQ is free to
put its errors. So the figure is the share of channels that other pictures drive beyond `FACTOR` times the
largest magnitude that calibration saw there. `LIMIT` lies between what was measured with pictures of the
styles of two trained checkpoints: calibrated on that style, at most 0.18 of the channels; on another style,
on one photograph or on blank pictures, 0.46 to 0.93 (docs/quality.md).
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fastvlm_convert.atomic_file import whole_file

FACTOR: Final = 1.5
LIMIT: Final = 0.3


@dataclass(frozen=True)
class Coverage:
    """Which pictures layers were solved on.

    Attributes:
        ranges: The largest magnitude in each channel of their image tokens, float32 [hidden].
        beyond_default: The share of those channels that the default mix drives beyond `FACTOR` times as far;
            0 where the mix itself calibrated.
    """

    ranges: np.ndarray
    beyond_default: float


def channel_ranges(features: np.ndarray) -> np.ndarray:
    """The largest magnitude in each channel, float32 [hidden].

    Args:
        features: Image tokens, float32 [..., hidden]; at least one.
    """
    ranges: np.ndarray = np.abs(features).reshape(-1, features.shape[-1]).max(axis=0)
    return ranges


def share_beyond(calibrated: np.ndarray, seen: np.ndarray) -> float:
    """The share of channels whose range is beyond `FACTOR` times the calibrated one.

    Args:
        calibrated: Ranges of the pictures that calibrated, float32 [hidden].
        seen: Ranges of other pictures, float32 [hidden]; of no more pictures than calibrated, because maxima
            grow with numbers.
    """
    return float(np.mean(seen > FACTOR * calibrated))


def coverage_note(share: float, pictures: str) -> str | None:
    """What to tell a user of a share; None where the pictures are covered.

    Args:
        share: From `share_beyond`.
        pictures: What the pictures are, in the plural.
    """
    if share <= LIMIT:
        return None
    return (
        f"{pictures} drive {share:.0%} of the image tokens' channels beyond {FACTOR} times what calibration "
        "saw: layers were solved on other pictures; calibrate with some of the kind that the model will be "
        "shown (--calibration FOLDER)"
    )


def save_coverage(path: Path, coverage: Coverage) -> None:
    """Write a coverage, whole or not at all."""
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, ranges=coverage.ranges, beyond_default=coverage.beyond_default)


def load_coverage(path: Path) -> Coverage | None:
    """A coverage that was saved; None where there is none, or a damaged one."""
    try:
        with np.load(path) as arrays:
            return Coverage(arrays["ranges"], float(arrays["beyond_default"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
