"""Signal to noise of every operation as a grid: a row a layer or block, a column an operation."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from fastvlm_convert.report.figures.canvas import LEVEL_INKS, LEVELS, MUTED, RULE, canvas, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Borders between the levels in dB: a grid of one bundle can be compared with that of another.
BORDERS: Final = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
EQUAL: Final = "="
UNKNOWN: Final = "\u2013"

_ROW, _TOP = 17.0, 76.0
_COLUMN, _WIDEST = 30.0, 40.0
_LONGEST = 18  # characters of a name
_NAME = re.compile(r"(?:l(?P<layer>\d+)|s(?P<stage>\d+)b(?P<block>\d+))_(?P<op>.+)")


@dataclass(frozen=True)
class Cell:
    """One operation.

    Attributes:
        name: `l3_gate`.
        sqnr_db: Signal to noise, or None.
        is_equal: Whether there is no noise at all.
    """

    name: str
    sqnr_db: float | None
    is_equal: bool


@dataclass(frozen=True)
class Grid:
    """Operations in rows and columns.

    Attributes:
        title: What they are part of.
        columns: Operations within a row.
        rows: Name of a row, and its cells by column.
    """

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Cell]]


def grids_of(cells: Sequence[Cell]) -> tuple[Grid, ...]:
    """Operations by part of the model: a row a layer or block, or a row for itself outside of any."""
    found: dict[str, dict[str, dict[str, Cell]]] = {"encoder": {}, "decoder": {}, "other": {}}
    for cell in cells:
        match = _NAME.fullmatch(cell.name)
        if match is None:
            found["other"].setdefault(cell.name, {})["output"] = cell
        elif match["layer"] is not None:
            found["decoder"].setdefault(f"layer {int(match['layer'])}", {})[match["op"]] = cell
        else:
            found["encoder"].setdefault(f"{int(match['stage'])}.{int(match['block'])}", {})[match["op"]] = (
                cell
            )
    return tuple(
        Grid(title, tuple(dict.fromkeys(op for row in rows.values() for op in row)), rows)
        for title, rows in found.items()
        if rows
    )


def level_of(cell: Cell) -> int:
    """Place of a cell's figure between the borders; the highest where there is no noise."""
    if cell.is_equal:
        return len(BORDERS)
    return sum(border <= (cell.sqnr_db or 0.0) for border in BORDERS)


def draw_grid(figure: str, grid: Grid, by: str) -> Markup:
    """The grid with its figures in whole dB.

    Args:
        figure: Its name on the page.
        grid: What to draw.
        by: What ran the operations.
    """
    column = min(_WIDEST, max(_COLUMN, 290.0 / len(grid.columns)))
    left = 12 + 6.2 * max(len(label(row, _LONGEST)) for row in grid.rows)
    width = max(left + column * len(grid.columns) + 52, 160.0)
    height = _TOP + _ROW * len(grid.rows) + 4
    title = f"Signal to noise by operation in dB, {by}, {grid.title}"
    with canvas(figure, title, _description(grid), height, width) as drawn:
        axes = drawn.axes(left, _TOP, column * len(grid.columns), _ROW * len(grid.rows))
        _draw_cells(axes, grid)
        axes.set_xlim(0, len(grid.columns))
        axes.set_ylim(len(grid.rows), 0)
        axes.set_yticks([y + 0.5 for y in range(len(grid.rows))], [label(row, _LONGEST) for row in grid.rows])
        axes.set_xticks([])
        for x, op in enumerate(grid.columns):
            name, place = label(op, _LONGEST), (x + 0.35, 0.0)
            axes.annotate(name, place, (0, 5), textcoords="offset pixels", rotation=45, color=MUTED)
    return drawn.svg


def _draw_cells(axes: "Axes", grid: Grid) -> None:
    """The cells: one path a level, which is far smaller than one a cell, and their figures."""
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path

    paths: dict[int | None, list[Path]] = {}
    for y, cells in enumerate(grid.rows.values()):
        for x, op in enumerate(grid.columns):
            if (cell := cells.get(op)) is None:
                continue
            level = level_of(cell) if cell.is_equal or cell.sqnr_db is not None else None
            square = Rectangle((x + 0.02, y + 0.04), 0.96, 0.92)
            paths.setdefault(level, []).append(square.get_path().transformed(square.get_patch_transform()))
            text = EQUAL if cell.is_equal else UNKNOWN if cell.sqnr_db is None else f"{cell.sqnr_db:.0f}"
            color = MUTED if level is None else LEVEL_INKS[level]
            axes.text(x + 0.5, y + 0.54, text, ha="center", va="center", fontsize=10, color=color)
    for level, squares in paths.items():
        look: dict[str, Any] = {"facecolor": "none", "edgecolor": RULE, "linewidth": 0.5}
        if level is not None:
            look = {"facecolor": LEVELS[level], "linewidth": 0}
        axes.add_patch(PathPatch(Path.make_compound_path(*squares), clip_on=False, zorder=0.5, **look))


def _description(grid: Grid) -> str:
    cells = [cell for row in grid.rows.values() for cell in row.values()]
    known = sorted((c.sqnr_db, c.name) for c in cells if c.sqnr_db is not None)
    equal = sum(cell.is_equal for cell in cells)
    worst = ", ".join(f"{name} {value:.0f} dB" for value, name in known[:5])
    lowest = f"Lowest: {worst}. " if known else ""
    return f"{len(cells)} operations. {lowest}{equal} equal. The table below the figures has all of them."
