"""How far a candidate is from a reference: functions of arrays of one shape, computed in float64.

They go through the arrays block by block: of what lies in the processor's cache the float64 copies are cheap.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np

_BLOCK: Final = 1 << 16  # numbers at a time, 512 KB of float64
_TINY: Final = float(np.finfo(np.float64).tiny)


def sqnr_db(reference: np.ndarray, candidate: np.ndarray) -> float | None:
    """Signal to quantization noise: 20 log10(|ref| / |ref - cand|) in dB; None where they are equal."""
    signal = noise = 0.0
    for r, c in _blocks(reference, candidate):
        signal += float(r @ r)
        r -= c
        noise += float(r @ r)
    with np.errstate(divide="ignore"):  # beside infinite noise a signal is nothing: minus infinity
        return None if noise == 0 else float(20 * np.log10(_root(signal) / np.sqrt(noise)))


def psnr_db(reference: np.ndarray, candidate: np.ndarray) -> float | None:
    """Peak signal to noise in dB, the peak being the reference's largest magnitude; None where equal."""
    peak, noise = _TINY, 0.0
    for r, c in _blocks(reference, candidate):
        peak = np.maximum(peak, np.abs(r).max())
        r -= c
        noise += float(r @ r)
    return None if noise == 0 else float(20 * np.log10(peak) - 10 * np.log10(noise / reference.size))


def max_abs_error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Largest absolute difference."""
    largest = 0.0
    for r, c in _blocks(reference, candidate):
        r -= c
        largest = np.maximum(largest, np.abs(r).max())
    return float(largest)


def cosine_similarity(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Cosine of the angle between the two, flattened."""
    sums = np.zeros(3)
    for r, c in _blocks(reference, candidate):
        sums += (r @ c, r @ r, c @ c)
    return float(sums[0] / (_root(sums[1]) * _root(sums[2])))


def kl_divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(reference || candidate) in nats over the softmax of logits [..., vocab]; one value a row."""
    *shape, vocabulary = reference.shape
    pairs = zip(*(logits.reshape(-1, vocabulary) for logits in (reference, candidate)), strict=True)
    rows = np.asarray([_row_divergence(r, c) for r, c in pairs], np.float64)
    return np.maximum(rows.reshape(shape), 0.0)  # rounding can give -1e-17


def top1_agreement(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Share of rows of logits [rows, vocab] whose largest entry is at the same index."""
    return float(np.mean(np.argmax(reference, -1) == np.argmax(candidate, -1)))


def _blocks(reference: np.ndarray, candidate: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both flattened, some numbers at a time, float64 and free to be written to."""
    assert reference.shape == candidate.shape
    flat, other = reference.reshape(-1), candidate.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        yield flat[part].astype(np.float64), other[part].astype(np.float64)


def _root(square: float) -> float:
    """The square root, or the smallest number above 0."""
    return max(float(np.sqrt(square)), _TINY)


def _row_divergence(reference: np.ndarray, candidate: np.ndarray) -> np.float64:
    p, q = _log_softmax(reference), _log_softmax(candidate)
    divergence: np.float64 = (np.exp(p) * (p - q)).sum()
    return divergence


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
