"""How far a candidate is from a reference: functions of arrays, computed in float64."""

import numpy as np


def sqnr_db(reference: np.ndarray, candidate: np.ndarray) -> float | None:
    """Signal to quantization noise: 20 log10(|ref| / |ref - cand|) in dB; None where they are equal."""
    noise = np.linalg.norm(_diff(reference, candidate))
    return None if noise == 0 else float(20 * np.log10(_norm(reference) / noise))


def psnr_db(reference: np.ndarray, candidate: np.ndarray) -> float | None:
    """Peak signal to noise in dB, the peak being the reference's largest magnitude; None where equal."""
    mse = float(np.mean(_diff(reference, candidate) ** 2))
    peak = float(np.abs(reference.astype(np.float64)).max(initial=np.finfo(np.float64).tiny))
    return None if mse == 0 else float(20 * np.log10(peak) - 10 * np.log10(mse))


def max_abs_error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Largest absolute difference."""
    return float(np.abs(_diff(reference, candidate)).max(initial=0.0))


def cosine_similarity(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Cosine of the angle between the two, flattened."""
    a, b = np.ravel(reference).astype(np.float64), np.ravel(candidate).astype(np.float64)
    return float(a @ b / (_norm(a) * _norm(b)))


def kl_divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(reference || candidate) in nats over the softmax of logits [..., vocab]; one value a row."""
    p, q = _log_softmax(reference), _log_softmax(candidate)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)  # rounding can give -1e-17


def top1_agreement(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Share of rows of logits [rows, vocab] whose largest entry is at the same index."""
    return float(np.mean(np.argmax(reference, -1) == np.argmax(candidate, -1)))


def _diff(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    return reference.astype(np.float64) - candidate.astype(np.float64)


def _norm(values: np.ndarray) -> float:
    return max(float(np.linalg.norm(values.astype(np.float64))), float(np.finfo(np.float64).tiny))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
