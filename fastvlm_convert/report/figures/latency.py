"""Latency side by side, each with its spread."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fastvlm_convert.report.figures.canvas import ACCENT, INK, MUTED, RULE, WIDTH, canvas, label
from fastvlm_convert.report.texts import number_text

_LEFT, _RIGHT, _ROW, _TITLE, _GAP = 112.0, 58.0, 22.0, 20.0, 12.0


@dataclass(frozen=True)
class Bar:
    """One contender's figure of one metric.

    Attributes:
        name: The contender.
        low: Where the spread begins.
        median: The figure.
        high: Where it ends.
        is_reference: Whether the others are compared with it.
    """

    name: str
    low: float
    median: float
    high: float
    is_reference: bool


@dataclass(frozen=True)
class Panel:
    """One metric.

    Attributes:
        title: Its name with its unit.
        better: `lower` or `higher`.
        bars: One a contender.
    """

    title: str
    better: str
    bars: tuple[Bar, ...]


def draw_latency(panels: Sequence[Panel]) -> Markup:
    """A panel for each metric: dots at the medians, lines over the spread, from zero.

    Args:
        panels: Not empty.
    """
    heights = [_TITLE + _ROW * len(panel.bars) + _GAP for panel in panels]
    description = "; ".join(
        f"{panel.title}: {', '.join(f'{bar.name} {number_text(bar.median)}' for bar in panel.bars)}"
        for panel in panels
    )
    with canvas("latency", "Latency with its spread", description, sum(heights)) as drawn:
        top = 0.0
        for panel, height in zip(panels, heights, strict=True):
            drawn.text(0, top + 13, panel.title, color=INK, fontweight="bold")
            drawn.text(WIDTH, top + 13, f"{panel.better} is better", color=MUTED, ha="right")
            axes = drawn.axes(_LEFT, top + _TITLE, WIDTH - _LEFT - _RIGHT, _ROW * len(panel.bars))
            largest = max(bar.high for bar in panel.bars) or 1.0
            for y, bar in enumerate(panel.bars):
                color = MUTED if bar.is_reference else ACCENT
                axes.plot([0, largest], [y, y], color=RULE, linewidth=0.75, clip_on=False)
                axes.plot(
                    [bar.low, bar.high], [y, y],
                    color=color, linewidth=5, solid_capstyle="round", alpha=0.4, clip_on=False,
                )  # fmt: skip
                axes.plot([bar.median], [y], "o", color=color, markersize=7, clip_on=False)
                axes.annotate(
                    number_text(bar.median), (largest, y), (10, 0), textcoords="offset pixels", va="center"
                )
            axes.set_xlim(0, largest)
            axes.set_ylim(len(panel.bars) - 0.5, -0.5)
            axes.set_xticks([])
            axes.set_yticks(range(len(panel.bars)), [label(bar.name, 17) for bar in panel.bars])
            top += height
    return drawn.svg
