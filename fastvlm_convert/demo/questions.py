"""Questions about a scene and their answers, one function per kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.scene import PLACES, SHAPES, Scene, Shape, Sign

_NUMBERS = ("no", "one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """A question about a picture, its kind, and the one right answer."""

    kind: str
    question: str
    answer: str


Pair = tuple[str, str]
Asker = Callable[[Scene, Draw], Pair | None]


def _color(scene: Scene, draw: Draw) -> Pair | None:
    if not scene.shapes:
        return None
    shape = draw.pick(list(scene.shapes.values()))
    template = draw.pick(("What color is the {}?", "What is the color of the {}?"))
    return template.format(shape.name), f"The {shape.name} is {shape.color}."


def _color_at(scene: Scene, draw: Draw) -> Pair | None:
    if not scene.shapes:
        return None
    place = draw.pick(list(scene.shapes))
    template = draw.pick(("What color is the shape at the {}?", "Which color is at the {}?"))
    return template.format(PLACES[place]), f"It is {scene.shapes[place].color}."


def _content(scene: Scene, draw: Draw) -> Pair | None:
    place = draw.index(len(PLACES))
    answer = phrase(scene.cells[place])
    template = draw.pick(("What is at the {}?", "What can you see at the {}?"))
    return template.format(PLACES[place]), answer[0].upper() + answer[1:] + "."


def _place(scene: Scene, draw: Draw) -> Pair | None:
    if not scene.shapes:
        return None
    place = draw.pick(list(scene.shapes))
    name = scene.shapes[place].name
    template = draw.pick(("Where is the {}?", "Where can you see the {}?"))
    return template.format(name), f"The {name} is at the {PLACES[place]}."


def _count(scene: Scene, draw: Draw) -> Pair | None:
    count = len(scene.shapes)
    question = draw.pick(("How many shapes are there?", "How many shapes can you see?"))
    if count == 1:
        return question, "There is one shape."
    return question, f"There are {_NUMBERS[count]} shapes."


def _exists(scene: Scene, draw: Draw) -> Pair | None:
    present = [shape.name for shape in scene.shapes.values()]
    absent = [name for name in SHAPES if name not in present]
    wanted = bool(present) and draw.chance(0.5)
    name = draw.pick(present if wanted else absent)
    question = draw.pick(("Is there a {}?", "Can you see a {}?")).format(name)
    return question, f"Yes, there is a {name}." if wanted else f"No, there is no {name}."


def _compare(scene: Scene, draw: Draw) -> Pair | None:
    large = [shape.name for shape in scene.shapes.values() if shape.size == "large"]
    small = [shape.name for shape in scene.shapes.values() if shape.size == "small"]
    if not large or not small:
        return None
    pair = draw.pick(large), draw.pick(small)
    winner, verb = (pair[0], "bigger") if draw.chance(0.5) else (pair[1], "smaller")
    first, second = draw.sample(pair, 2)
    return f"Which is {verb}, the {first} or the {second}?", f"The {winner} is {verb}."


def _relation(scene: Scene, draw: Draw) -> Pair | None:
    if len(scene.shapes) < 2:
        return None
    first, second = draw.sample(list(scene.shapes), 2)
    true = _directions(first, second)
    false = [d for d in ("left of", "right of", "above", "below") if d not in true]
    holds = draw.chance(0.5)
    direction = draw.pick(true if holds else false)
    names = scene.shapes[first].name, scene.shapes[second].name
    question = f"Is the {names[0]} {direction} the {names[1]}?"
    return question, "Yes, it is." if holds else "No, it is not."


def _word(scene: Scene, draw: Draw) -> Pair | None:
    if scene.word is None:
        return None
    question = draw.pick(("What does the sign say?", "Which word is on the sign?"))
    return question, f"The sign says {scene.word.text}."


def _number(scene: Scene, draw: Draw) -> Pair | None:
    if scene.number is None:
        return None
    question = draw.pick(("Which number is shown?", "What is the number?"))
    return question, f"The number is {scene.number.text}."


def _format(scene: Scene, draw: Draw) -> Pair | None:
    question = draw.pick(("Is the picture wide, tall or square?", "Which format is the picture?"))
    return question, f"The picture is {scene.format}."


def _describe(scene: Scene, draw: Draw) -> Pair | None:
    question = draw.pick(("Describe the picture.", "Describe the image."))
    parts = [
        f"{phrase(thing)} at the {place}"
        for place, thing in zip(PLACES, scene.cells, strict=True)
        if thing is not None
    ]
    things = "one thing" if len(parts) == 1 else f"{_NUMBERS[len(parts)]} things"
    listing = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    rest = "" if len(parts) == len(PLACES) else " The rest of the picture is empty."
    return question, f"This {scene.format} picture shows {things}: {listing}.{rest}"


ASKERS: dict[str, Asker] = {
    "color": _color,
    "color_at": _color_at,
    "content": _content,
    "position": _place,
    "count": _count,
    "exists": _exists,
    "comparison": _compare,
    "relation": _relation,
    "word": _word,
    "number": _number,
    "format": _format,
    "description": _describe,
}
KINDS = tuple(ASKERS)


def ask(scene: Scene, kind: str, draw: Draw) -> Question | None:
    """A question of one kind, or None if the scene has nothing to ask it about."""
    pair = ASKERS[kind](scene, draw)
    return None if pair is None else Question(kind, *pair)


def ask_all(scene: Scene, draw: Draw) -> tuple[Question, ...]:
    """One question of every kind that the scene allows."""
    questions = (ask(scene, kind, draw) for kind in KINDS)
    return tuple(question for question in questions if question is not None)


def phrase(thing: Shape | Sign | None) -> str:
    """A thing in words, as answers name it."""
    if thing is None:
        return "nothing"
    if isinstance(thing, Shape):
        return f"a {thing.size} {thing.color} {thing.name}"
    return f"the number {thing.text}" if thing.is_number else f"a sign that says {thing.text}"


def _directions(first: int, second: int) -> list[str]:
    """How cell `first` lies as seen from cell `second`."""
    directions = []
    if first % 2 != second % 2:
        directions.append("left of" if first % 2 < second % 2 else "right of")
    if first // 2 != second // 2:
        directions.append("above" if first // 2 < second // 2 else "below")
    return directions
