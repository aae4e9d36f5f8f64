"""Draw a scene with PIL, antialiased, with Pillow's bundled font."""

from __future__ import annotations

import math
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from fastvlm_convert.demo.scene import Scene, Shape, Sign

Point = tuple[float, float]

_OVERSAMPLE = 2
_RADIUS = {"small": 0.20, "large": 0.40}  # of the shorter side of a cell
_JITTER = 0.06
_PLATES = (  # plate, ink
    ((250, 250, 245), (15, 15, 25)),
    ((20, 45, 110), (250, 250, 250)),
    ((250, 215, 60), (20, 20, 20)),
)


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB picture of `scene.width` x `scene.height` pixels."""
    picture = Image.new("RGB", (2, 2))
    picture.putdata(list(scene.corners))
    picture = picture.resize((scene.width, scene.height), Image.Resampling.BILINEAR)
    cell_width, cell_height = scene.width / 2, scene.height / 2
    for index, thing in enumerate(scene.cells):
        if thing is None:
            continue
        shift = _JITTER * min(cell_width, cell_height)
        x = cell_width * (index % 2 + 0.5) + shift * thing.offset[0]
        y = cell_height * (index // 2 + 0.5) + shift * thing.offset[1]
        if isinstance(thing, Shape):
            _draw_shape(picture, thing, (x, y), min(cell_width, cell_height))
        else:
            _draw_sign(picture, thing, (x, y), cell_width)
    return picture


def _draw_shape(picture: Image.Image, shape: Shape, center: Point, side: float) -> None:
    radius = _RADIUS[shape.size] * shape.scale * side
    cos, sin = math.cos(math.radians(shape.angle)), math.sin(math.radians(shape.angle))
    left, top = round(center[0] - radius) - 2, round(center[1] - radius) - 2
    extent = 2 * math.ceil(radius) + 6
    mask = Image.new("L", (extent * _OVERSAMPLE, extent * _OVERSAMPLE))
    points = [
        (
            (center[0] - left + radius * (cos * x - sin * y)) * _OVERSAMPLE,
            (center[1] - top + radius * (sin * x + cos * y)) * _OVERSAMPLE,
        )
        for x, y in outline(shape.name)
    ]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    picture.paste(shape.tint, (left, top), mask.reduce(_OVERSAMPLE))


def _draw_sign(picture: Image.Image, sign: Sign, center: Point, cell_width: float) -> None:
    plate, ink = _PLATES[sign.style]
    unit = cell_width * sign.scale
    half_width, half_height = 0.45 * unit, 0.24 * unit
    pencil = ImageDraw.Draw(picture)
    left, top = center[0] - half_width, center[1] - half_height
    pencil.rectangle((left, top, left + 2 * half_width, top + 2 * half_height), fill=plate)
    slot, font_size = (0.29, 0.44) if sign.is_number else (0.21, 0.29)
    font = _font(round(font_size * unit))
    # One slot per letter: neither kerning nor the text layout engine can change a picture.
    for index, letter in enumerate(sign.text):
        x = center[0] + (index - (len(sign.text) - 1) / 2) * slot * unit
        pencil.text((round(x), round(center[1])), letter, fill=ink, font=font, anchor="mm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@cache
def outline(name: str) -> tuple[Point, ...]:
    """The outline of a shape inside the unit circle, y pointing down."""
    if name == "circle":
        return _arc(1.0, 0, 360)
    if name == "square":
        side = 0.84
        return ((-side, -side), (side, -side), (side, side), (-side, side))
    if name == "triangle":
        return ((0.0, -0.98), (0.98, 0.8), (-0.98, 0.8))
    if name == "star":
        radii = (1.0, 0.42)
        return tuple(_polar(radii[i % 2], -90 + 36 * i) for i in range(10))
    if name == "heart":
        return _heart()
    if name == "cross":
        arm = 0.3
        corner = ((-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm))
        return corner + tuple((-x, -y) for x, y in corner)
    if name == "ring":
        return _arc(1.0, 0, 360) + _arc(0.55, 360, 0)
    if name == "moon":
        inner = tuple((x + 0.5, y) for x, y in _arc(0.86, 285, 75))
        return _arc(1.0, 61, 299) + inner
    raise ValueError(f"unknown shape {name!r}")


def _polar(radius: float, degrees: float) -> Point:
    angle = math.radians(degrees)
    return radius * math.cos(angle), radius * math.sin(angle)


def _arc(radius: float, start: float, stop: float) -> tuple[Point, ...]:
    steps = 48
    return tuple(_polar(radius, start + (stop - start) * i / steps) for i in range(steps + 1))


def _heart() -> tuple[Point, ...]:
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 17))
    return tuple(points)
