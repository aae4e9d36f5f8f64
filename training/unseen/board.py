"""What a picture of the unseen style shows: a board of two or four rows, each with another instrument.

Nothing here, nor in `drawing` or `questions`, is shared with what calibrates by default, except the seeded
choices of `Draw`: things, colors, textures, letters, layout and questions are others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastvlm_convert.demo.draw import Draw

NUM_COLUMNS = 4
INSTRUMENTS = ("word", "chart", "dial", "cloth", "icons", "curve")
ORDINALS = ("first", "second", "third", "fourth")
NUMBERS = ("one", "two", "three", "four")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORDS = (
    "LAMP MOSS WIND HARP PLUM DUSK VEIL ZINC KELP JADE OXEN QUIZ BIRD CROW FERN "
    "GLOW HUSK IRON LYNX MINT NEST OATS PINE ROPE SILK TUBA URNS WOLF YARN DAWN"
)
WORDS = tuple(_WORDS.split())
DIRECTIONS = ("up", "up right", "right", "down right", "down", "down left", "left", "up left")
WEAVES = ("stripes", "dots", "checks", "waves", "zigzags", "rings")
DYES = {
    "teal": (20, 130, 130),
    "pink": (235, 120, 165),
    "brown": (120, 75, 40),
    "olive": (120, 125, 30),
    "navy": (25, 35, 95),
    "silver": (165, 170, 180),
}
ICONS = ("fish", "tree", "house", "key", "cup", "bolt", "leaf", "boat")
TRENDS = ("rises", "falls", "peaks", "dips", "swings", "rests")

# Field -> values of the dense labels; an empty string means "none".
FIELDS: dict[str, tuple[str, ...]] = {
    "instrument": ("", *INSTRUMENTS),
    "letter": ("", *LETTERS),
    "height": ("", *NUMBERS),
    "direction": ("", *DIRECTIONS),
    "weave": ("", *WEAVES),
    "dye": ("", *DYES),
    "icon": ("", *ICONS),
    "trend": ("", *TRENDS),
    "row": ("", *NUMBERS),
}


@dataclass(frozen=True)
class Strip:
    """A row of a board.

    Attributes:
        instrument: One of `INSTRUMENTS`.
        facts: A value for each of its columns: letters, heights, the direction where the dial is, icons; or
            one for the row: the trend; or two: weave and dye.
        look: Seed of all that no answer depends on.
    """

    instrument: str
    facts: tuple[str, ...]
    look: int


@dataclass(frozen=True)
class Board:
    """A picture: its size in pixels, the seed of its ground, and its rows from top to bottom."""

    width: int
    height: int
    ground: int
    strips: tuple[Strip, ...]

    def row_of(self, instrument: str) -> int | None:
        """The row with an instrument, counted from 0; None where there is none."""
        return next((n for n, strip in enumerate(self.strips) if strip.instrument == instrument), None)


def make_board(draw: Draw) -> Board:
    """Draw a board: four rows on a square, or two on a wide picture; no instrument twice."""
    width = 256 + draw.index(145)
    is_wide = draw.chance(0.3)
    names = draw.sample(INSTRUMENTS, 2 if is_wide else 4)
    strips = tuple(Strip(name, _facts(name, draw), draw.index(1 << 30)) for name in names)
    return Board(width, width // 2 if is_wide else width, draw.index(1 << 30), strips)


def _facts(instrument: str, draw: Draw) -> tuple[str, ...]:
    if instrument == "word":
        return tuple(draw.pick(WORDS))
    if instrument == "chart":
        return tuple(draw.sample(NUMBERS, NUM_COLUMNS))
    if instrument == "cloth":
        return draw.pick(WEAVES), draw.pick(tuple(DYES))
    if instrument == "curve":
        return (draw.pick(TRENDS),)
    chosen, count = (
        (draw.pick(DIRECTIONS), 1) if instrument == "dial" else (draw.pick(ICONS), 1 + draw.index(4))
    )
    filled = set(draw.sample(range(NUM_COLUMNS), count))
    return tuple(chosen if column in filled else "" for column in range(NUM_COLUMNS))


def token_labels(board: Board) -> np.ndarray:
    """Labels (16, fields) int64 of the image tokens of a board; a wide one has the inner two rows of four."""
    labels = np.zeros((4, NUM_COLUMNS, len(FIELDS)), np.int64)
    first = (4 - len(board.strips)) // 2
    for row, strip in enumerate(board.strips):
        for column in range(NUM_COLUMNS):
            values = {"instrument": strip.instrument, "row": NUMBERS[row], **_label(strip, column)}
            for field, (name, options) in enumerate(FIELDS.items()):
                labels[first + row, column, field] = options.index(values.get(name, ""))
    return labels.reshape(4 * NUM_COLUMNS, len(FIELDS))


def _label(strip: Strip, column: int) -> dict[str, str]:
    fields = {"word": "letter", "chart": "height", "dial": "direction", "icons": "icon"}
    if strip.instrument == "cloth":
        return dict(zip(("weave", "dye"), strip.facts, strict=True))
    if strip.instrument == "curve":
        return {"trend": strip.facts[0]}
    return {fields[strip.instrument]: strip.facts[column]}
