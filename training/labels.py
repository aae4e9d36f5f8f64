"""Dense labels: what every image token should know, as small integers.

A cell of the 2x2 layout covers 2x2 of the 4x4 image tokens; all four carry the cell's labels.
"""

from __future__ import annotations

import numpy as np

from fastvlm_convert.demo.scene import (
    COLORS,
    FORMATS,
    PLACES,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    Shape,
    Sign,
)

NUM_SLOTS = 4
CHARACTERS = "".join(sorted(set("".join(WORDS)) | set("0123456789")))

# Field -> values; an empty string means "none".
FIELDS: dict[str, tuple[str, ...]] = {
    "shape": ("", *SHAPES),
    "color": ("", *COLORS),
    "size": ("", *SIZES),
    "sign": ("", "word", "number"),
    **{f"slot{slot}": ("", *CHARACTERS) for slot in range(NUM_SLOTS)},
    "place": PLACES,
    "format": FORMATS,
}

FIRST_TOKENS = (0, 2, 8, 10)  # one image token per cell
_CELL_OF_TOKEN = np.array([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])


def token_labels(scene: Scene) -> np.ndarray:
    """Labels (16, fields) int64 of the image tokens of a scene."""
    cells = np.zeros((len(PLACES), len(FIELDS)), np.int64)
    for place, thing in enumerate(scene.cells):
        values = {"place": PLACES[place], "format": scene.format}
        if isinstance(thing, Shape):
            values |= {"shape": thing.name, "color": thing.color, "size": thing.size}
        elif isinstance(thing, Sign):
            values["sign"] = "number" if thing.is_number else "word"
            values |= {f"slot{slot}": letter for slot, letter in enumerate(thing.text)}
        for field, (name, options) in enumerate(FIELDS.items()):
            cells[place, field] = options.index(values.get(name, ""))
    return cells[_CELL_OF_TOKEN]
