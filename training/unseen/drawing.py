"""Draw a board: curves, gauges, charts, weaves, and letters of 5 x 7 dots, on crumpled or ruled paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from fastvlm_convert.demo.draw import Draw
from unseen.board import DIRECTIONS, DYES, NUM_COLUMNS, NUMBERS, Board, Strip

CELL = 96  # pixels of a cell as it is drawn; the picture is then scaled to its size
Color = tuple[int, int, int]

# Seven rows of five dots, as numbers whose lowest bit is the right dot.
_FONT = {
    "A": (14, 17, 17, 31, 17, 17, 17), "B": (30, 17, 17, 30, 17, 17, 30), "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30), "E": (31, 16, 16, 30, 16, 16, 31), "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 15), "H": (17, 17, 17, 31, 17, 17, 17), "I": (14, 4, 4, 4, 4, 4, 14),
    "J": (7, 2, 2, 2, 2, 18, 12), "K": (17, 18, 20, 24, 20, 18, 17), "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17), "N": (17, 25, 21, 19, 17, 17, 17), "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16), "Q": (14, 17, 17, 17, 21, 18, 13), "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30), "T": (31, 4, 4, 4, 4, 4, 4), "U": (17, 17, 17, 17, 17, 17, 14),
    "V": (17, 17, 17, 17, 17, 10, 4), "W": (17, 17, 17, 21, 21, 27, 17), "X": (17, 17, 10, 4, 10, 17, 17),
    "Y": (17, 17, 10, 4, 4, 4, 4), "Z": (31, 1, 2, 4, 8, 16, 31),
}  # fmt: skip


def draw_board(board: Board) -> Image.Image:
    """Draw a board as an RGB picture of `board.width` x `board.height` pixels."""
    columns, rows = NUM_COLUMNS * CELL, len(board.strips) * CELL
    picture = _paper(columns, rows, Draw(board.ground))
    pencil = ImageDraw.Draw(picture)
    for row, strip in enumerate(board.strips):
        _draw_strip(picture, pencil, strip, row * CELL)
    return picture.resize((board.width, board.height), Image.Resampling.BICUBIC)


def _paper(width: int, height: int, draw: Draw) -> Image.Image:
    """Crumpled paper: a few waves of light across a pale or dark tint."""
    is_dark = draw.chance(0.3)
    tint = np.array([draw.uniform(40, 80) if is_dark else draw.uniform(190, 245) for _ in range(3)])
    y, x = 4 * np.mgrid[0 : height // 4, 0 : width // 4].astype(np.float32)
    light = np.zeros(y.shape, np.float32)
    for _ in range(4):
        angle, length = draw.uniform(0, math.pi), draw.uniform(12, 160)
        phase = 2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / length
        light += draw.uniform(1, 7) * np.sin(phase + draw.uniform(0, 6))
    coarse = Image.fromarray(np.clip(tint + light[:, :, None], 0, 255).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _draw_strip(picture: Image.Image, pencil: ImageDraw.ImageDraw, strip: Strip, top: int) -> None:
    draw = Draw(strip.look)
    ink = _ink(picture, draw, top)
    if strip.instrument == "cloth":
        weave, dye = strip.facts
        _draw_cloth(picture, draw, weave, DYES[dye], top)
    elif strip.instrument == "curve":
        _draw_curve(pencil, draw, strip.facts[0], ink, top)
    else:
        drawers = {"word": _draw_letter, "chart": _draw_bar, "dial": _draw_dial, "icons": _draw_icon}
        for column, fact in enumerate(strip.facts):
            drawers[strip.instrument](pencil, draw, fact, ink, (column * CELL, top))


def _ink(picture: Image.Image, draw: Draw, top: int) -> Color:
    """A color that stands out from the paper."""
    is_dark = sum(picture.getpixel((CELL // 2, top + CELL // 2))) < 360  # type: ignore[arg-type]
    low, high = (170, 255) if is_dark else (0, 110)
    red, green, blue = (int(draw.uniform(low, high)) for _ in range(3))
    return red, green, blue


Corner = tuple[int, int]


def _draw_letter(pencil: ImageDraw.ImageDraw, draw: Draw, letter: str, ink: Color, corner: Corner) -> None:
    dot = draw.uniform(8.5, 11)
    left = corner[0] + (CELL - 5 * dot) / 2 + draw.uniform(-5, 5)
    top = corner[1] + (CELL - 7 * dot) / 2 + draw.uniform(-4, 4)
    for row, bits in enumerate(_FONT[letter]):
        for column in range(5):
            if bits >> (4 - column) & 1:
                x, y = left + column * dot, top + row * dot
                pencil.ellipse((x, y, x + dot + 1, y + dot + 1), fill=ink)


def _draw_bar(pencil: ImageDraw.ImageDraw, draw: Draw, height: str, ink: Color, corner: Corner) -> None:
    """A hatched bar that stands on the axis."""
    tall = (NUMBERS.index(height) + 1) * 0.22 * CELL
    half, step = draw.uniform(20, 32), 5 + draw.index(5)
    middle, bottom = corner[0] + CELL / 2 + draw.uniform(-6, 6), corner[1] + CELL - 5
    pencil.line((corner[0], bottom, corner[0] + CELL, bottom), fill=ink, width=3)
    pencil.rectangle((middle - half, bottom - tall, middle + half, bottom), outline=ink, width=4)
    for y in range(int(bottom - tall), int(bottom), step):
        pencil.line((middle - half, y, middle + half, y), fill=ink, width=2)


def _draw_dial(pencil: ImageDraw.ImageDraw, draw: Draw, direction: str, ink: Color, corner: Corner) -> None:
    """A gauge with a needle, or where there is no direction the ticks of a ruler."""
    x, y = corner[0] + CELL / 2, corner[1] + CELL / 2
    if not direction:
        for tick in range(0, CELL, 12):
            pencil.line((corner[0] + tick, y - 8, corner[0] + tick, y + 8), fill=ink, width=2)
        return
    radius = draw.uniform(36, 44)
    pencil.ellipse((x - radius, y - radius, x + radius, y + radius), outline=ink, width=4)
    for tick in range(12):
        dx, dy = math.cos(tick * math.pi / 6), math.sin(tick * math.pi / 6)
        pencil.line(
            (x + 0.85 * radius * dx, y + 0.85 * radius * dy, x + radius * dx, y + radius * dy), ink, 2
        )
    angle = math.radians(45 * DIRECTIONS.index(direction) + draw.uniform(-6, 6))
    dx, dy = math.sin(angle), -math.cos(angle)
    tip, wide = 0.8 * radius, 7
    pencil.polygon(
        ((x + tip * dx, y + tip * dy), (x - wide * dy, y + wide * dx), (x + wide * dy, y - wide * dx)),
        fill=ink,
    )
    pencil.ellipse((x - 8, y - 8, x + 8, y + 8), fill=ink)


def _draw_cloth(picture: Image.Image, draw: Draw, weave: str, dye: Color, top: int) -> None:
    width = NUM_COLUMNS * CELL
    y, x = np.mgrid[0:CELL, 0:width].astype(np.float32)
    period, shift = draw.uniform(22, 30), draw.uniform(0, 30)
    u, v = (x + shift) / period, (y + shift) / period
    weaves: dict[str, Callable[[], np.ndarray]] = {
        "stripes": lambda: (u + v) % 1 < 0.5,
        "dots": lambda: np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.33,
        "checks": lambda: (u % 1 < 0.5) ^ (v % 1 < 0.5),
        "waves": lambda: (v + 0.3 * np.sin(2 * math.pi * u)) % 1 < 0.5,
        "zigzags": lambda: (v + 0.9 * np.abs(u % 1 - 0.5)) % 1 < 0.5,
        "rings": lambda: np.abs(np.hypot(u % 2 - 1, v % 2 - 1) - 0.6) < 0.2,
    }
    pale = np.array([draw.uniform(225, 250) for _ in range(3)], np.float32)
    mask = weaves[weave]()[:, :, None]
    threads = np.where(mask, np.array(dye, np.float32), pale) + 6 * np.sin(2.1 * x[:1])[:, :, None]
    picture.paste(Image.fromarray(np.clip(threads, 0, 255).astype(np.uint8)), (0, top))


def _draw_curve(pencil: ImageDraw.ImageDraw, draw: Draw, trend: str, ink: Color, top: int) -> None:
    """A line on graph paper."""
    width = NUM_COLUMNS * CELL
    grid = tuple((c + 128) // 2 for c in ink)
    for step in range(0, width, 16):
        pencil.line((step, top + 6, step, top + CELL - 6), fill=grid, width=1)
    t = np.linspace(0, 1, 60)
    shapes = {
        "rises": t,
        "falls": 1 - t,
        "peaks": np.exp(-(((t - 0.5) / 0.18) ** 2)),
        "dips": 1 - np.exp(-(((t - 0.5) / 0.18) ** 2)),
        "swings": 0.5 + 0.5 * np.sin(2 * math.pi * (3 * t + draw.uniform(0, 1))),
        "rests": 0.5 + 0.03 * np.sin(9 * t),
    }
    tall, low = draw.uniform(58, 72), top + CELL - draw.uniform(10, 16)
    points = [(float(x * width), float(low - tall * y)) for x, y in zip(t, shapes[trend], strict=True)]
    pencil.line(points, fill=ink, width=5 + draw.index(4), joint="curve")


def _draw_icon(pencil: ImageDraw.ImageDraw, draw: Draw, icon: str, ink: Color, corner: Corner) -> None:
    if not icon:
        return
    scale = draw.uniform(0.34, 0.42) * CELL
    x, y = corner[0] + CELL / 2 + draw.uniform(-6, 6), corner[1] + CELL / 2 + draw.uniform(-5, 5)
    for outline in _outlines(icon):
        pencil.polygon([(x + scale * px, y + scale * py) for px, py in outline], fill=ink)


Outline = tuple[tuple[float, float], ...]


def _round(x: float, y: float, width: float, height: float) -> Outline:
    angles = [2 * math.pi * n / 24 for n in range(24)]
    return tuple((x + width * math.cos(a), y + height * math.sin(a)) for a in angles)


def _leaf() -> Outline:
    side = tuple((0.5 * math.sin(math.pi * n / 12), n / 6 - 1) for n in range(13))
    return side + tuple((-x, y) for x, y in reversed(side))


def _box(left: float, top: float, right: float, bottom: float) -> Outline:
    return (left, top), (right, top), (right, bottom), (left, bottom)


@cache
def _outlines(icon: str) -> tuple[Outline, ...]:
    """The outlines of an icon within -1..1, y pointing down."""
    outlines: dict[str, tuple[Outline, ...]] = {
        "fish": (_round(-0.15, 0, 0.75, 0.42), ((0.4, 0), (1, -0.5), (1, 0.5))),
        "tree": (_round(0, -0.35, 0.62, 0.6), _box(-0.13, 0.1, 0.13, 1)),
        "house": (((-1, 0), (0, -0.95), (1, 0)), _box(-0.7, 0, -0.15, 0.9), _box(0.15, 0, 0.7, 0.9)),
        "key": (_round(-0.55, 0, 0.42, 0.42), _box(-0.2, -0.1, 1, 0.12), _box(0.55, 0.1, 0.7, 0.5)),
        "cup": (((-0.75, -0.6), (0.45, -0.6), (0.25, 0.7), (-0.55, 0.7)), _box(0.4, -0.4, 0.95, -0.2),
                _box(0.75, -0.4, 0.95, 0.3), _box(0.3, 0.15, 0.95, 0.35)),
        "bolt": (((0.25, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.2), (0.05, -0.2)),),
        "leaf": (_leaf(),),
        "boat": (((-1, 0.35), (1, 0.35), (0.55, 0.85), (-0.55, 0.85)), ((0, -1), (0, 0.2), (-0.75, 0.2)),
                 ((0.12, -0.7), (0.12, 0.2), (0.75, 0.2))),
    }  # fmt: skip
    return outlines[icon]
