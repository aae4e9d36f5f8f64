"""The search over a fine grid, with both signs or zero points of every range: the oracle of `search`."""

import numpy as np

from fastvlm_convert.quantization.candidates import Parameters, candidates, storable
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme

STEPS = {4: 20, 8: 6}
REFINEMENTS = 2
TINY = np.finfo(np.float32).tiny


def exhaustive(
    weight: np.ndarray, scheme: AffineScheme, importance: np.ndarray | None = None
) -> AffineMatrix:
    """What `quantize_affine` approximates; the same arguments."""
    rows, columns = weight.shape
    shape = rows, scheme.num_blocks(columns), -1
    blocks = weight.reshape(shape)
    roots = np.ones(columns, np.float32)
    if importance is not None:
        roots = np.sqrt(importance / importance.max()).astype(np.float32)
    scale, zero = _best(blocks, roots.reshape(shape[1:]), scheme)
    q = _nearest(blocks, scale, zero, scheme) + zero[..., None]
    return AffineMatrix(
        scheme,
        q.reshape(rows, columns).astype(np.uint8),
        scale.astype(np.float16),
        zero.astype(np.uint8),
    )


def _best(blocks: np.ndarray, roots: np.ndarray, scheme: AffineScheme) -> Parameters:
    """Scales and zero points of blocks [rows, blocks, size]."""
    weighted = blocks * roots

    def residual(scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps = _nearest(blocks, scale, zero, scheme) * roots
        return steps, weighted - steps * scale[..., None]

    def keep(scale: np.ndarray, zero: np.ndarray) -> None:
        nonlocal best
        steps, error = residual(scale, zero)
        cross, norm = _dot(error, steps), _dot(steps, steps)
        fit = storable(scale + cross / np.maximum(norm, TINY))
        change = fit - scale
        found = fit, zero, _dot(error, error) + change * (change * norm - 2 * cross)
        better = found[2] < best[2]
        best = tuple(np.where(better, new, old) for new, old in zip(found, best, strict=True))

    tries = candidates(blocks, scheme, STEPS[scheme.bits])
    scale, zero = next(tries)
    error = residual(scale, zero)[1]
    plain = _dot(error, error)
    best: tuple[np.ndarray, ...] = scale, zero, plain
    for tried in tries:
        keep(*tried)
    for _ in range(REFINEMENTS):
        keep(*best[:2])
    scale, zero, _ = best
    overlap = _dot(weighted, residual(scale, zero)[0])
    usable = np.abs(overlap) > TINY
    unshrunk = storable(np.where(usable, _dot(weighted, weighted) / np.where(usable, overlap, 1), scale))
    error = residual(unshrunk, zero)[1]
    return np.where(_dot(error, error) <= plain, unshrunk, scale), zero


def _nearest(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, scheme: AffineScheme) -> np.ndarray:
    """`q - z` of plain rounding."""
    steps = np.rint(blocks * np.reciprocal(scale)[..., None])
    return np.clip(steps, -zero[..., None], (scheme.levels - 1 - zero)[..., None])


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products over the last axis."""
    return np.einsum("...i,...i->...", a, b)
