"""What the C library does with memory that was freed."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_MIB: Final = 1 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of malloc.h
_NO_LIMIT: Final = (1 << 31) - 1
_MAPPED: Final = 1 << 16  # blocks of their own that glibc allows by default
_KEPT: Final = 32 * _MIB  # the largest block that glibc keeps, once such a one was freed


def return_freed_memory() -> None:
    """Have glibc give all memory back to the system that was freed and that it keeps (malloc_trim(3)).

    For the end of a stage that used much more than the next needs; it costs some milliseconds. Nothing
    happens with another C library.
    """
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Have glibc give every freed block of a megabyte back to the system, while this context is entered.

    By default it keeps freed blocks of up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). A runtime that loads a
    graph makes and frees a gigabyte of them, and what lies between those that stay is lost. Nothing happens
    with another C library.
    """
    if not _is_glibc():
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _MIB)
    try:
        yield
    finally:
        _restore_thresholds()


@contextmanager
def freed_blocks_kept() -> Iterator[None]:
    """Have glibc keep every freed block for the next, while this context is entered; then all goes back.

    By default blocks of more than 32 MiB are mapped and unmapped each time, and the system clears every page
    that it hands out: a quarter of the time in which torch computes activations of that size. Nothing happens
    with another C library.
    """
    if not _is_glibc():
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, _NO_LIMIT)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, _MAPPED)
        _restore_thresholds()
        return_freed_memory()


def _restore_thresholds() -> None:
    """Where glibc's thresholds end by themselves once a large block was freed."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _KEPT)
    mallopt(_TRIM_THRESHOLD, 2 * _KEPT)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
