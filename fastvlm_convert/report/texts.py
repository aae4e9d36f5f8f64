"""Figures and names as people read them."""

from typing import Final

from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.targets import BACKENDS

_BESIDE_TARGETS: Final = {"bundle": "files", "weights": "weights alone"}
_WORDS: Final = {
    "db": "dB", "kl": "KL", "sqnr": "SQNR", "psnr": "PSNR", "abs": "absolute", "max": "maximum",
    "top1": "top-1",
}  # fmt: skip


def target_name(target: str) -> str:
    """A target as people call it."""
    return backend_of(target).title if target in BACKENDS else _BESIDE_TARGETS.get(target, target)


def metric_text(metric: str) -> str:
    """A metric's name as a person writes it: `sqnr_db` is `SQNR dB`."""
    return " ".join(_WORDS.get(word, word) for word in metric.split("_"))


def number_text(value: float | None, digits: int = 3) -> str:
    """A figure with some significant digits, without an exponent where it is not small."""
    if value is None:
        return "-"
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def sentence(text: str) -> str:
    """Words that others wrote without a beginning and an end."""
    ends = text.endswith((".", "!", "?", ":"))
    return f"{text[:1].upper()}{text[1:]}{'' if ends else '.'}"
