"""Whether the pictures that a bundle is verified on are of the kind that it was calibrated on."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from fastvlm_convert.quantization.coverage import channel_ranges, coverage_note, share_beyond
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel

_MOST: Final = 32  # questions looked at: maxima of many more pictures would be larger by their number alone


def coverage_warnings(ranges: np.ndarray, reference: LoadedModel, questions: Sequence[Question]) -> list[str]:
    """A warning where pictures drive the image tokens far beyond what calibration saw; or none.

    Args:
        ranges: The largest magnitude in each channel that calibration saw, float32 [hidden].
        reference: The float model.
        questions: What is verified on.
    """
    shown = [question for question in questions if question.images][:_MOST]
    if not shown:
        return []
    prompts = [reference.conversation(question.messages) for question in shown]
    features = [reference.session.encode_image(image) for prompt in prompts for image in prompt.images]
    note = coverage_note(share_beyond(ranges, channel_ranges(np.stack(features))), "the pictures asked about")
    return [] if note is None else [note]
