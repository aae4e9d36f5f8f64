"""Which pictures calibrate, and their hash."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.errors import ImageError
from fastvlm_convert.quantization.calibration import read_calibration
from fastvlm_convert.recipe_settings import CalibrationSettings
from tests.checkpoints import LLAVA, golden_checkpoint

SETTINGS = CalibrationSettings(num_samples=3)
TOKENIZER = golden_checkpoint(LLAVA).tokenizer
LINE = '{{"image": "{}.png", "question": "{}"{}}}'


@pytest.fixture
def listing(tmp_path):
    for name in "abcde":
        Image.new("RGB", (4, 3), (10 * ord(name) % 256, 0, 0)).save(tmp_path / f"{name}.png")
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(LINE.format(name, "What?", "") for name in "abcde"))
    return path


def test_the_mix_by_default():
    found = read_calibration(None, SETTINGS, TOKENIZER)
    assert [len(q.images) for q in found.questions] == [1, 1, 1, 0, 0, 0]  # texts follow
    assert len({q.text for q in found.questions}) > 1
    more = read_calibration(None, replace(SETTINGS, num_samples=4), TOKENIZER)
    assert [q.text for q in more.questions[:3]] == [q.text for q in found.questions[:3]]
    assert found == read_calibration(None, SETTINGS, TOKENIZER)
    assert found.sha256 != more.sha256


def test_the_first_of_a_file(listing):
    found = read_calibration(listing, SETTINGS, TOKENIZER)
    assert [np.asarray(q.images[0])[0, 0, 0] for q in found.questions] == [
        10 * ord(name) % 256 for name in "abc"
    ]
    (listing.parent / "e.png").write_bytes(b"no image")  # not reached
    assert read_calibration(listing, SETTINGS, TOKENIZER).sha256 == found.sha256
    with pytest.raises(ImageError):
        read_calibration(listing, CalibrationSettings(), TOKENIZER)


@pytest.mark.parametrize("part", ["picture", "size", "question", "answer", "order"])
def test_everything_is_in_the_hash(listing, part):
    before = read_calibration(listing, SETTINGS, TOKENIZER).sha256
    picture, line = listing.parent / "a.png", LINE.format("a", "What?", "")
    match part:
        case "picture":
            Image.new("RGB", (4, 3), "green").save(picture)
        case "size":
            image = Image.open(picture)
            image.resize((3, 4)).save(picture)
        case "question":
            listing.write_text(listing.read_text().replace(line, LINE.format("a", "Why?", "")))
        case "answer":
            listing.write_text(listing.read_text().replace(line, LINE.format("a", "What?", ', "answer": ""')))
        case "order":
            listing.write_text("\n".join(reversed(listing.read_text().splitlines()[:3])))
    assert read_calibration(listing, SETTINGS, TOKENIZER).sha256 != before


def test_names_and_places_are_not(listing, tmp_path):
    before = read_calibration(listing, SETTINGS, TOKENIZER).sha256
    (listing.parent / "a.png").rename(listing.parent / "z.png")
    listing.write_text(listing.read_text().replace("a.png", "z.png") + "\n\n")
    assert read_calibration(listing.rename(tmp_path / "other.jsonl"), SETTINGS, TOKENIZER).sha256 == before
