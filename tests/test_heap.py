"""Memory that was freed goes back to the system when asked."""

import ctypes
import platform

import numpy as np
import pytest

from fastvlm_convert.heap import freed_blocks_kept, return_freed_memory
from fastvlm_convert.peak_memory import resident_bytes

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides for itself")


@glibc
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


def faults_of_large_blocks() -> int:
    """Pages that the system hands out while eight blocks of 64 MB are made and freed one after the other."""
    resource, library = pytest.importorskip("resource"), ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        block = ctypes.c_void_p(library.malloc(ctypes.c_size_t(64_000_000)))
        ctypes.memset(block, 1, 64_000_000)
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
def test_large_blocks_are_kept_for_the_next_and_given_back_in_the_end():
    usual = faults_of_large_blocks()
    with freed_blocks_kept():
        assert faults_of_large_blocks() < usual / 4
        inside = resident_bytes()
    assert inside is not None
    assert inside - resident_bytes() > 60e6
    assert faults_of_large_blocks() > usual / 2  # as before
