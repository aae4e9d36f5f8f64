"""Memory that was freed goes back to the system when asked."""

import platform

import numpy as np
import pytest

from fastvlm_convert.heap import return_freed_memory
from fastvlm_convert.peak_memory import resident_bytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides for itself")
def test_blocks_freed_between_others_are_given_back():
    blocks = [np.ones(100_000, np.uint8) for _ in range(1000)]
    blocks = blocks[::10]
    before = resident_bytes()
    return_freed_memory()
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert before - after > 60e6
    assert all(block.all() for block in blocks)
