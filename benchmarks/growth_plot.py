"""Two panels as one SVG file: seconds and memory against parameters, with a line through each stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 340, 300, 56, 34, 78
COLORS = ("#1f6fb4", "#c4541b", "#2c8a4b", "#7b4ea3")


@dataclass(frozen=True)
class Line:
    """A stage.

    Attributes:
        name: As the legend calls it.
        sizes: Billions of parameters.
        times: CPU seconds at each.
        peaks: GiB at each.
    """

    name: str
    sizes: Sequence[float]
    times: Sequence[float]
    peaks: Sequence[float]


def round_up(value: float) -> float:
    """The next number of one digit: 1, 2, 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(power * next(step for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9)))


def _panel(offset: float, title: str, sizes: list[Sequence[float]], values: list[Sequence[float]]) -> str:
    """One panel: axes, points and least-squares lines."""
    right, floor = WIDTH - 14, HEIGHT - BOTTOM
    most_x = round_up(max(max(s) for s in sizes))
    most_y = round_up(max(max(v) for v in values))

    def x(size: float) -> float:
        return offset + LEFT + size / most_x * (right - LEFT)

    def y(value: float) -> float:
        return floor - value / most_y * (floor - TOP)

    parts = [f'<text x="{offset + LEFT}" y="{TOP - 14}" class="title">{escape(title)}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = y(share * most_y)
        parts.append(f'<path d="M{offset + LEFT} {at:.1f}H{offset + right}" class="rule"/>')
        parts.append(f'<text x="{offset + LEFT - 6}" y="{at + 4:.1f}" class="end">{share * most_y:g}</text>')
        place = x(share * most_x)
        parts.append(f'<text x="{place:.1f}" y="{floor + 16}" class="middle">{share * most_x:g}</text>')
    middle = offset + (LEFT + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{floor + 32}" class="middle">billion parameters</text>')
    for color, xs, ys in zip(COLORS, sizes, values, strict=False):
        if len(set(xs)) > 1:
            slope, base = np.polyfit(xs, ys, 1)
            ends = [(s, max(0.0, base + slope * s)) for s in (min(xs), max(xs))]
            path = " ".join(f"{x(s):.1f} {y(v):.1f}" for s, v in ends)
            parts.append(f'<path d="M{path}" stroke="{color}" class="line"/>')
        parts += [
            f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5" fill="{color}"/>'
            for s, v in zip(xs, ys, strict=True)
        ]
    return "\n".join(parts)


def draw(lines: Sequence[Line]) -> str:
    """The SVG file; equal figures give equal text."""
    if len(lines) > len(COLORS):
        raise ValueError(f"{len(lines)} stages and {len(COLORS)} colors")
    sizes = [line.sizes for line in lines]
    legend = [
        f'<circle cx="{LEFT + 150 * n}" cy="{HEIGHT - 20}" r="4" fill="{color}"/>'
        f'<text x="{LEFT + 150 * n + 9}" y="{HEIGHT - 16}">{escape(line.name)}</text>'
        for n, (line, color) in enumerate(zip(lines, COLORS, strict=False))
    ]
    style = (
        "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.middle{text-anchor:middle}"
        ".end{text-anchor:end}.rule{stroke:#ddd}.line{fill:none;stroke-width:1.5}"
    )
    total = 2 * WIDTH
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {HEIGHT}" role="img">',
            "<title>Time and memory of each stage against the size of the model</title>",
            f'<style>{style}</style><rect width="{total}" height="{HEIGHT}" fill="#fff"/>',
            _panel(0, "CPU seconds", sizes, [line.times for line in lines]),
            _panel(WIDTH, "peak memory, GiB", sizes, [line.peaks for line in lines]),
            *legend,
            "</svg>\n",
        ]
    )
