"""How the divergence of the answers' tokens is distributed."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from markupsafe import Markup

from fastvlm_convert.report.figures.canvas import ACCENT, INK, MUTED, RULE, WIDTH, canvas
from fastvlm_convert.report.texts import number_text

_LOWEST, _HIGHEST, _PER_DECADE = -9, 1, 2
_PANEL, _TITLE, _BOTTOM = 84.0, 42.0, 22.0
_MARKS: Final = ((-9, "0"), (-7, "1e-7"), (-5, "1e-5"), (-3, "0.001"), (-1, "0.1"), (1, "10"))


def draw_divergence(number: int, name: str, kl: Sequence[float]) -> Markup:
    """A histogram over decades.

    Args:
        number: Of the figure among its kind on the page.
        name: Who answered.
        kl: Divergence of every token in nats; not empty.
    """
    edges = np.linspace(_LOWEST, _HIGHEST, (_HIGHEST - _LOWEST) * _PER_DECADE + 1)
    # What is too small for the scale, zero included, stands in its first bar.
    logs = np.clip([math.log10(v) if v > 0 else _LOWEST for v in kl], _LOWEST, _HIGHEST - 1e-9)
    counts, _ = np.histogram(logs, edges)
    mean = float(np.mean(kl))
    title = f"Distribution of KL divergence by token, {name}"
    height = _TITLE + _PANEL + _BOTTOM
    with canvas(f"divergence-{number}", title, f"{len(kl)} tokens: {_summary(kl)}", height) as drawn:
        drawn.text(0, 14, name, color=INK, fontweight="bold")
        drawn.text(0, 30, _summary(kl), color=MUTED)
        axes = drawn.axes(4, _TITLE, WIDTH - 8, _PANEL)
        shown = counts > 0
        axes.bar(
            edges[:-1][shown],
            counts[shown],
            width=0.92 / _PER_DECADE,
            align="edge",
            color=ACCENT,
            clip_on=False,
        )
        if mean > 0:
            place = min(max(math.log10(mean), _LOWEST), _HIGHEST)
            axes.axvline(place, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.axhline(0, color=RULE, linewidth=1)
        axes.set_xlim(_LOWEST, _HIGHEST)
        axes.set_ylim(bottom=0)
        axes.set_yticks([])
        axes.set_xticks([x for x, _ in _MARKS], [text for _, text in _MARKS])
        axes.get_xticklabels()[0].set_horizontalalignment("left")
        axes.get_xticklabels()[-1].set_horizontalalignment("right")
    return drawn.svg


def _summary(kl: Sequence[float]) -> str:
    points = (
        ("mean", float(np.mean(kl))),
        ("median", float(np.median(kl))),
        ("p99", float(np.quantile(kl, 0.99))),
        ("max", float(np.max(kl))),
    )
    return ", ".join(f"{word} {number_text(value)}" for word, value in points)
