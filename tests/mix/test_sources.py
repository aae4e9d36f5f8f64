"""Photographs and printed matter, one source at a time."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvlm_convert
from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.mix.photographs import NAMES, QUESTIONS, SUBJECTS, photograph
from fastvlm_convert.mix.printed import document, receipt, screen

PHOTOS = Path(fastvlm_convert.__file__).parent / "mix" / "photos"
PRINTED = {"document": document, "receipt": receipt, "screen": screen}


def brightness(image: Image.Image, top: float, bottom: float) -> float:
    """The mean of a band, from shares of the height."""
    values = np.asarray(image.convert("L"), np.float64)
    return float(values[int(top * len(values)) : int(bottom * len(values))].mean())


@pytest.mark.parametrize("name", NAMES)
class TestPhotographs:
    def test_the_same_for_equal_seeds_only(self, name):
        (first, question), (again, same), (other, _) = (photograph(name, Draw(seed)) for seed in (5, 5, 6))
        assert (first.tobytes(), question) == (again.tobytes(), same)
        assert first.tobytes() != other.tobytes()

    def test_crops_within_the_picture(self, name):
        with Image.open(PHOTOS / f"{name}.jpg") as whole:
            for seed in range(12):
                image, question = photograph(name, Draw(seed))
                assert image.mode == "RGB"
                assert min(image.size) >= 150
                assert (image.width <= whole.width, image.height <= whole.height) == (True, True)
                assert question in (*SUBJECTS[name], *QUESTIONS)
                assert 0.5 <= image.width / image.height <= 2

    def test_has_its_line_among_the_licenses(self, name):
        text = (PHOTOS / "PROVENANCE.md").read_text(encoding="utf-8")
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}.jpg` |")]
        assert re.search(r"\| (CC0|public domain): ", line)


def test_photographs_are_upright():
    """The sky is above the photographer and the lawn below, however it is cropped and mirrored."""
    crops = [photograph("camera", Draw(seed))[0] for seed in range(20)]
    assert np.mean([brightness(crop, 0, 0.2) - brightness(crop, 0.8, 1) for crop in crops]) > 20


def test_light_varies():
    levels = [brightness(photograph("brick", Draw(seed))[0], 0, 1) for seed in range(12)]
    assert max(levels) > 1.1 * min(levels)


def test_all_photographs_are_listed_and_small():
    assert {path.stem for path in PHOTOS.glob("*.jpg")} == set(NAMES)
    assert {path.name for path in PHOTOS.iterdir()} == {"PROVENANCE.md", *(f"{name}.jpg" for name in NAMES)}
    assert sum(path.stat().st_size for path in PHOTOS.iterdir()) <= 3_000_000


@pytest.mark.parametrize("kind", PRINTED)
class TestPrinted:
    def test_the_same_for_equal_seeds_only(self, kind):
        (first, question), (again, same), (other, _) = (PRINTED[kind](Draw(seed)) for seed in (5, 5, 6))
        assert (first.tobytes(), question) == (again.tobytes(), same)
        assert first.tobytes() != other.tobytes()

    def test_sizes_and_questions(self, kind):
        found = [PRINTED[kind](Draw(seed)) for seed in range(12)]
        assert all(image.mode == "RGB" and min(image.size) >= 380 for image, _ in found)
        questions = {question for _, question in found}
        assert len(questions) > 2
        others = {draw(Draw(n))[1] for k, draw in PRINTED.items() if k != kind for n in range(4)}
        assert questions.isdisjoint(others)

    def test_there_is_ink(self, kind):
        for seed in range(6):
            values = np.asarray(PRINTED[kind](Draw(seed))[0].convert("L"), np.float64)
            edges = np.abs(np.diff(values, axis=1)) > 60
            assert edges.mean() > 0.002


def test_pages_lie_on_a_table():
    for draw in (document, receipt):
        image, _ = draw(Draw(3))
        corners = {image.getpixel((x, y)) for x in (1, image.width - 2) for y in (1, image.height - 2)}
        assert len(corners) == 1
        assert brightness(image, 0.3, 0.7) > np.mean(corners.pop()) + 50


def test_screens_have_their_button_below():
    for seed in range(8):
        image, question = screen(Draw(seed))
        assert image.size == (390, 760)
        assert image.getpixel((40, 735)) != image.getpixel((5, 735))
        assert question.endswith(("?", "."))
