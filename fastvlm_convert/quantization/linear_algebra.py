"""Products and factorizations of large matrices, where most of a calibration's time goes.

torch computes them: its library is two to three times as fast as NumPy's at Cholesky factorizations (measured
with 4864 columns). NumPy goes in and out.
"""

from typing import Final

import numpy as np
import torch

_BLOCK: Final = 640  # columns of a symmetric product computed at a time; what lies below the diagonal is not


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a @ b` of matrices of one dtype."""
    result: np.ndarray = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
    return result


def add_gram(total: np.ndarray, x: np.ndarray) -> None:
    """Add `x^T x` to the blocks on and above the diagonal; `mirror` completes the sum.

    Args:
        total: float64 [columns, columns], changed.
        x: float32 [rows, columns].
    """
    transposed = x.T
    for start in range(0, len(total), _BLOCK):
        part = slice(start, start + _BLOCK)
        total[part, start:] += product(transposed[part], x[:, start:])


def mirror(total: np.ndarray) -> None:
    """Copy what is above the diagonal below it; float64 [columns, columns], changed."""
    for start in range(0, len(total), _BLOCK):
        part, behind = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        total[behind, part] = total[part, behind].T
        block = total[part, part]
        block[...] = np.triu(block) + np.triu(block, 1).T


def cholesky(matrix: np.ndarray) -> np.ndarray | None:
    """Lower triangular L with `matrix = L L^T`, float64; None where the matrix is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    result: np.ndarray = lower.numpy()
    return None if failed.item() else result


def solve(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """X with `matrix X = wanted` for a symmetric positive definite matrix; float64.

    Raises:
        ValueError: The matrix is not positive definite.
    """
    lower = cholesky(matrix)
    if lower is None:
        raise ValueError("the matrix is not positive definite")
    result: np.ndarray = torch.cholesky_solve(torch.from_numpy(wanted), torch.from_numpy(lower)).numpy()
    return result
