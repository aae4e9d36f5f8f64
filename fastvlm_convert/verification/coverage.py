"""Whether the pictures that a bundle is verified on are of the kind that it was calibrated on."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from fastvlm_convert.quantization.coverage import channel_ranges, coverage_note, share_beyond
from fastvlm_convert.verification.reference_run import ReferenceRun

_MOST: Final = 32  # pictures looked at: maxima of many more would be larger by their number alone


def coverage_warnings(ranges: np.ndarray, runs: Sequence[ReferenceRun]) -> list[str]:
    """A warning where pictures drive the image tokens far beyond what calibration saw; or none.

    Args:
        ranges: The largest magnitude in each channel that calibration saw, float32 [hidden].
        runs: What the float model made of the questions that are verified on.
    """
    features = [picture for run in runs for picture in run.features][:_MOST]
    if not features:
        return []
    note = coverage_note(share_beyond(ranges, channel_ranges(np.stack(features))), "the pictures asked about")
    return [] if note is None else [note]
