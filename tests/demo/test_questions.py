"""Every answer says what the scene shows."""

import re

import pytest

from fastvlm_convert.demo import make_sample
from fastvlm_convert.demo.scene import PLACES, SHAPES, Shape

NUMBERS = ["no", "one", "two", "three", "four"]
SAMPLES = [make_sample(seed) for seed in range(150)]


def asked(kind):
    """(scene, question, answer) of one kind, over all samples."""
    found = [
        (sample.scene, q.question, q.answer) for sample in SAMPLES for q in sample.questions if q.kind == kind
    ]
    assert len(found) > 20
    return found


def place_of(text):
    return next(index for index, place in enumerate(PLACES) if place in text)


def named(scene, text):
    """Place -> shape of the shapes that a text names, in the order of the text."""
    names = re.findall("|".join(SHAPES), text)
    places = {shape.name: place for place, shape in scene.shapes.items()}
    return [(places[name], scene.cells[places[name]]) for name in names]


def test_color():
    for scene, question, answer in asked("color"):
        [(_, shape)] = named(scene, question)
        assert answer == f"The {shape.name} is {shape.color}."


def test_color_at():
    for scene, question, answer in asked("color_at"):
        assert answer == f"It is {scene.cells[place_of(question)].color}."


def test_content():
    for scene, question, answer in asked("content"):
        thing = scene.cells[place_of(question)]
        if thing is None:
            assert answer == "Nothing."
        elif isinstance(thing, Shape):
            assert answer == f"A {thing.size} {thing.color} {thing.name}."
        else:
            assert answer.endswith(f" {thing.text}.")


def test_position():
    for scene, question, answer in asked("position"):
        [(place, shape)] = named(scene, question)
        assert answer == f"The {shape.name} is at the {PLACES[place]}."


def test_count():
    for scene, _, answer in asked("count"):
        assert NUMBERS[len(scene.shapes)] in answer.split()


def test_exists():
    for scene, question, answer in asked("exists"):
        [name] = re.findall("|".join(SHAPES), question)
        present = name in [shape.name for shape in scene.shapes.values()]
        assert answer.startswith("Yes" if present else "No")


def test_comparison():
    for scene, question, answer in asked("comparison"):
        sizes = {shape.name: shape.size for _, shape in named(scene, question)}
        assert sorted(sizes.values()) == ["large", "small"]
        wanted = "large" if "bigger" in question else "small"
        [(_, winner)] = named(scene, answer)
        assert sizes[winner.name] == wanted


@pytest.mark.parametrize(
    ("direction", "holds"),
    [
        ("left of", lambda a, b: a % 2 < b % 2),
        ("right of", lambda a, b: a % 2 > b % 2),
        ("above", lambda a, b: a // 2 < b // 2),
        ("below", lambda a, b: a // 2 > b // 2),
    ],
)
def test_relation(direction, holds):
    for scene, question, answer in asked("relation"):
        if direction in question:
            (first, _), (second, _) = named(scene, question)
            assert answer.startswith("Yes" if holds(first, second) else "No")


@pytest.mark.parametrize("kind", ["word", "number"])
def test_reading(kind):
    for scene, _, answer in asked(kind):
        assert answer.endswith(f" {getattr(scene, kind).text}.")


def test_description_names_everything():
    for scene, _, answer in asked("description"):
        assert f"This {scene.format} picture" in answer
        for place, thing in enumerate(scene.cells):
            assert (PLACES[place] in answer) == (thing is not None)
            if isinstance(thing, Shape):
                assert f"{thing.size} {thing.color} {thing.name} at the {PLACES[place]}" in answer
            elif thing is not None:
                assert f"{thing.text} at the {PLACES[place]}" in answer


def test_shapes_are_unique_and_signs_too():
    for sample in SAMPLES:
        names = [shape.name for shape in sample.scene.shapes.values()]
        assert len(names) == len(set(names))
        signs = [cell for cell in sample.scene.cells if cell is not None and not isinstance(cell, Shape)]
        assert len(signs) == len({sign.is_number for sign in signs})
