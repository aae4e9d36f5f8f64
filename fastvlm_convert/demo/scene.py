"""What a demo picture shows: up to four things, one per quadrant, chosen by a seed."""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm_convert.demo.draw import Draw

COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 160, 60),
    "blue": (35, 85, 220),
    "purple": (140, 50, 170),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
FORMATS = ("square", "wide", "tall")
_SIGNS = (  # no M or W: every letter gets a slot of the same width
    "EXIT OPEN STOP TAXI CAFE PARK BANK FIRE HELP LEFT DOOR SALE RENT FISH CAKE JAZZ "
    "LIFT GOLD BIKE YOGA BOOK QUAY VISA HOLD BUS BAR ZOO GAS ICE SPA TEA PUB"
)
WORDS = tuple(_SIGNS.split())
NUM_STYLES = 3

_COUNT_WEIGHTS = (0.12, 0.36, 0.70, 1.0)  # cumulative, for one to four things


@dataclass(frozen=True)
class Shape:
    """A colored shape; offsets, scale and angle vary its drawing but no answer."""

    name: str
    color: str
    size: str
    offset: tuple[float, float]
    scale: float
    angle: float
    tint: tuple[int, ...]


@dataclass(frozen=True)
class Sign:
    """A plate with a word or a two-digit number on it."""

    text: str
    offset: tuple[float, float]
    scale: float
    style: int

    @property
    def is_number(self) -> bool:
        """Whether the plate shows a number."""
        return self.text.isdigit()


@dataclass(frozen=True)
class Scene:
    """One picture: its size in pixels, its corner colors, and a thing or None per place."""

    width: int
    height: int
    corners: tuple[tuple[int, ...], ...]
    cells: tuple[Shape | Sign | None, ...]

    @property
    def format(self) -> str:
        """`wide`, `tall` or `square`."""
        if self.width == self.height:
            return "square"
        return "wide" if self.width > self.height else "tall"

    @property
    def shapes(self) -> dict[int, Shape]:
        """Cell index -> shape."""
        return {i: cell for i, cell in enumerate(self.cells) if isinstance(cell, Shape)}

    @property
    def word(self) -> Sign | None:
        """The plate with a word, if there is one."""
        return next((c for c in self.cells if isinstance(c, Sign) and not c.is_number), None)

    @property
    def number(self) -> Sign | None:
        """The plate with a number, if there is one."""
        return next((c for c in self.cells if isinstance(c, Sign) and c.is_number), None)


def make_scene(draw: Draw) -> Scene:
    """Draw a scene: one to four things, no shape twice, at most one word and one number."""
    width, height = _picture_size(draw)
    gray = draw.uniform(112, 160)
    base = [gray + draw.uniform(-14, 14) for _ in range(3)]
    corners = tuple(tuple(int(c + draw.uniform(-12, 12)) for c in base) for _ in range(4))

    roll = draw.uniform(0.0, 1.0)
    count = 1 + sum(roll >= weight for weight in _COUNT_WEIGHTS[:-1])
    things: list[Shape | Sign] = []
    if draw.chance(0.5):
        things.append(_make_sign(draw, draw.pick(WORDS)))
    if len(things) < count and draw.chance(0.4):
        things.append(_make_sign(draw, str(10 + draw.index(90))))
    names = draw.sample(SHAPES, count - len(things))
    things += [_make_shape(draw, name) for name in names]

    cells: list[Shape | Sign | None] = [None] * len(PLACES)
    for place, thing in zip(draw.sample(range(len(PLACES)), count), things, strict=True):
        cells[place] = thing
    return Scene(width, height, corners, tuple(cells))


def _picture_size(draw: Draw) -> tuple[int, int]:
    long_side = 224 + draw.index(177)
    picture_format = draw.pick(FORMATS)
    if picture_format == "square":
        return long_side, long_side
    short_side = int(long_side / draw.uniform(1.2, 4 / 3))
    return (long_side, short_side) if picture_format == "wide" else (short_side, long_side)


def _make_shape(draw: Draw, name: str) -> Shape:
    color = draw.pick(tuple(COLORS))
    return Shape(
        name=name,
        color=color,
        size=draw.pick(SIZES),
        offset=(draw.uniform(-1, 1), draw.uniform(-1, 1)),
        scale=draw.uniform(0.92, 1.08),
        angle=draw.uniform(-8, 8),
        tint=tuple(int(min(255, max(0, c + draw.uniform(-10, 10)))) for c in COLORS[color]),
    )


def _make_sign(draw: Draw, text: str) -> Sign:
    return Sign(
        text=text,
        # A plate is almost as wide as its cell, so it moves sideways by little.
        offset=(draw.uniform(-0.3, 0.3), draw.uniform(-1, 1)),
        scale=draw.uniform(0.95, 1.05),
        style=draw.index(NUM_STYLES),
    )
