"""Bytes by component and by how they are stored."""

from collections.abc import Mapping

from markupsafe import Markup

from fastvlm_convert.amounts import size_text
from fastvlm_convert.report.figures.canvas import FONT_SIZE, INK, MUTED, RULE, SERIES, WIDTH, canvas, label

_LEFT, _RIGHT, _ROW, _LEGEND = 74.0, 58.0, 28.0, 18.0
OTHER = "other"


def draw_sizes(components: Mapping[str, Mapping[str, float]]) -> Markup:
    """One bar a component, divided by storage.

    Args:
        components: Bytes by storage, by component; not empty.
    """
    kinds = _kinds(components)
    legend = _LEGEND * ((len(kinds) + 1) // 2) + 6
    height = legend + _ROW * len(components) + 8
    longest = max(sum(parts.values()) for parts in components.values()) or 1.0
    description = "; ".join(
        f"{name}: {', '.join(f'{size_text(size)} {kind}' for kind, size in parts.items())}"
        for name, parts in components.items()
    )
    with canvas("sizes", "Sizes by component and storage", description, height) as drawn:
        for n, kind in enumerate(kinds):
            x, y = 4 + (n % 2) * WIDTH / 2, 13 + _LEGEND * (n // 2)
            drawn.text(x, y, "\u25a0", color=SERIES[n], fontsize=FONT_SIZE + 2)
            drawn.text(x + 16, y, kind, color=MUTED)
        axes = drawn.axes(_LEFT, legend, WIDTH - _LEFT - _RIGHT, _ROW * len(components))
        for row, (_, parts) in enumerate(components.items()):
            start = 0.0
            for n, kind in enumerate(kinds):
                size = sum(s for k, s in parts.items() if _kind(k, kinds) == kind)
                axes.barh(row, size, left=start, height=0.56, color=SERIES[n], clip_on=False)
                start += size
            axes.annotate(
                size_text(start), (start, row), (5, 0), textcoords="offset pixels", va="center", color=INK
            )
        axes.set_xlim(0, longest)
        axes.set_ylim(len(components) - 0.5, -0.5)
        axes.axvline(0, color=RULE, linewidth=1)
        axes.set_xticks([])
        axes.set_yticks(range(len(components)), [label(name, 12) for name in components])
    return drawn.svg


def _kinds(components: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Ways of storage, those with the most bytes first; the last one stands for all that have no color."""
    totals: dict[str, float] = {}
    for parts in components.values():
        for kind, size in parts.items():
            totals[kind] = totals.get(kind, 0.0) + size
    kinds = sorted(totals, key=lambda kind: (-totals[kind], kind))
    return kinds if len(kinds) <= len(SERIES) else [*kinds[: len(SERIES) - 1], OTHER]


def _kind(kind: str, kinds: list[str]) -> str:
    return kind if kind in kinds else OTHER
