"""Generated pictures, questions and answers, deterministic by seed."""

from fastvlm_convert.demo.questions import KINDS, Question
from fastvlm_convert.demo.samples import (
    Sample,
    check_samples,
    held_out,
    make_sample,
    write_check_images,
)
from fastvlm_convert.demo.scene import Scene

__all__ = [
    "KINDS",
    "Question",
    "Sample",
    "Scene",
    "check_samples",
    "held_out",
    "make_sample",
    "write_check_images",
]
