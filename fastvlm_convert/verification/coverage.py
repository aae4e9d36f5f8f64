"""Whether the pictures that a bundle is verified on are of the kind that it was calibrated on."""

from collections.abc import Sequence

import numpy as np

from fastvlm_convert.quantization.coverage import Coverage, coverage_warning, share_beyond
from fastvlm_convert.verification.reference_run import ReferenceRun


def coverage_warnings(calibrated: Coverage, runs: Sequence[ReferenceRun]) -> list[str]:
    """A warning where pictures drive the image tokens far beyond what calibration saw; or none.

    Args:
        calibrated: What layers were solved on.
        runs: What the float model made of the questions that are verified on.
    """
    features = [picture.reshape(-1, picture.shape[-1]) for run in runs for picture in run.features]
    warning = coverage_warning(share_beyond(calibrated, np.stack(features))) if features else None
    return [] if warning is None else [warning]
