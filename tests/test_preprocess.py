import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.errors import ImageError, PromptError
from fastvlm_convert.io_names import SYSTEM_PROMPT
from fastvlm_convert.preprocess import MAX_IMAGE_EDGE, build_prompt, load_image, pixel_values, square

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class Letters:
    """A tokenizer with one token a character; notes what it was asked."""

    def __init__(self):
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return [ord(char) for char in text]


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def stripes(width, height):
    """Left quarter red, the middle green, the right quarter blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 4] = RED
    pixels[:, width // 4 : -(width // 4)] = GREEN
    pixels[:, -(width // 4) :] = BLUE
    return Image.fromarray(pixels)


# Making images square


@pytest.mark.parametrize(("width", "height"), [(64, 32), (64, 33), (32, 64), (31, 64), (64, 64), (64, 1)])
def test_padding_keeps_every_pixel_and_puts_black_around(width, height):
    image = picture(width, height)
    padded = np.asarray(square(image, 64, "pad"))  # the longer edge is 64: nothing is resized
    left, top = (64 - width) // 2, (64 - height) // 2
    np.testing.assert_array_equal(padded[top : top + height, left : left + width], np.asarray(image))
    inside = np.zeros((64, 64), bool)
    inside[top : top + height, left : left + width] = True
    assert (padded[~inside] == 0).all()


@pytest.mark.parametrize(("width", "height"), [(64, 32), (65, 32), (32, 64), (32, 33), (32, 32)])
def test_cropping_takes_the_centre_of_the_longer_edge(width, height):
    image = picture(width, height)
    cropped = np.asarray(square(image, 32, "crop"))  # the shorter edge is 32: nothing is resized
    left, top = (width - 32) // 2, (height - 32) // 2
    np.testing.assert_array_equal(cropped, np.asarray(image)[top : top + 32, left : left + 32])


def test_cropping_resizes_by_the_shorter_edge_padding_by_the_longer():
    image = stripes(400, 100)
    cropped = np.asarray(square(image, 50, "crop"))
    assert cropped.shape == (50, 50, 3)
    assert (cropped == GREEN).all()  # what is left and right is lost
    padded = np.asarray(square(image, 100, "pad"))
    assert (padded[50, 5] == RED).all()
    assert (padded[50, 50] == GREEN).all()
    assert (padded[50, 95] == BLUE).all()
    assert (padded[:36] == 0).all()  # a quarter is picture, less the edge that the resize softens


def test_the_resize_is_bicubic():
    """A step between black and white overshoots, which of the usual filters only cubic ones do."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20] = 60
    pixels[:, 20:] = 200
    for mode in ("pad", "crop"):
        row = np.asarray(square(Image.fromarray(pixels), 80, mode))[40, :, 0].astype(int)
        assert row.min() < 60
        assert row.max() > 200
        assert row.min() > 40


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [64, 96])
def test_pixel_values_are_scaled_rgb_planes(mode, size):
    image = Image.new("RGB", (size, size), (255, 51, 0))
    values = pixel_values(image, size, mode)
    assert values.shape == (1, 3, size, size)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    for plane, value in enumerate((1.0, 0.2, 0.0)):
        assert (values[0, plane] == np.float32(value)).all()


def test_rows_stay_rows():
    image = Image.new("RGB", (64, 64))
    image.paste(RED, (0, 0, 64, 10))
    values = pixel_values(image, 64, "pad")
    assert values[0, 0, :10].min() == 1
    assert values[0, 0, 10:].max() == 0


def test_a_strip_that_cropping_would_blow_up_is_refused():
    strip = Image.new("RGB", (MAX_IMAGE_EDGE, 1))
    with pytest.raises(ImageError, match=f"{MAX_IMAGE_EDGE} x 1 pixels is too narrow to crop 1024 x 1024"):
        square(strip, 1024, "crop")


# Reading files


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    image = picture(20, 10).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    loaded = load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (20, 10))
    with Image.open(path) as again:
        assert again.mode == mode
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(again.convert("RGB")))


def test_transparency_is_dropped_not_blended(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (200, 100, 50)


def test_a_rotation_tag_is_ignored_as_the_reference_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(20, 10).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 10)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "ppm"])
def test_a_truncated_image_is_an_error(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    picture(60, 40).save(path)
    load_image(path)
    raw = path.read_bytes()
    for size in (0, 1, 10, len(raw) // 2, len(raw) * 9 // 10):
        path.write_bytes(raw[:size])
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert str(path) in str(caught.value)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("This is a picture of a cat.")
    for path, message in (
        (tmp_path / "a.png", "not an image"),
        (tmp_path / "b.png", "there is no such image"),
        (tmp_path, "cannot be decoded"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(path)


def test_a_variant_that_pil_does_not_implement_is_an_error(tmp_path):
    path = tmp_path / "a.dds"
    picture(8, 8).save(path)
    raw = bytearray(path.read_bytes())
    raw[80:84] = bytes(4)  # the pixel format's flags
    path.write_bytes(raw)
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(path)


def png(width, height):
    """A small file that claims to be a large image."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"), [(100_000, 100_000), (1 << 30, 1), (1, 60_000), (MAX_IMAGE_EDGE + 1, 10)]
)
def test_an_absurdly_large_image_is_refused_before_it_is_decoded(width, height, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height))
    with pytest.raises(ImageError, match="absurdly large"):
        load_image(path)


def test_a_large_image_gives_no_warning(tmp_path, monkeypatch):
    picture(30, 20).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # PIL warns from there, and refuses from twice that
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "a.png").size == (30, 20)


# Prompts

BEFORE = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"


def build(question, num_images):
    letters = Letters()
    images = [picture(64, 64, seed) for seed in range(num_images)]
    prompt = build_prompt(question, images, letters, 64, "pad")
    assert ["".join(map(chr, s)) for s in prompt.segments] == letters.texts
    assert all(s.dtype == np.int64 for s in prompt.segments)
    for image, values in zip(images, prompt.images, strict=True):
        np.testing.assert_array_equal(values, pixel_values(image, 64, "pad"))
    return prompt, letters.texts


def test_one_image_stands_before_the_question_on_its_own_line():
    prompt, texts = build("Who?", 1)
    assert texts == [BEFORE, f"\nWho?{AFTER}"]
    assert prompt.length(16) == len(BEFORE) + len(AFTER) + 5 + 16


def test_text_alone():
    prompt, texts = build("Who?", 0)
    assert texts == [f"{BEFORE}Who?{AFTER}"]
    assert prompt.length(16) == len(texts[0])


def test_several_images_come_first_one_a_line():
    prompt, texts = build("Same?", 3)
    assert texts == [BEFORE, "\n", "\n", f"\nSame?{AFTER}"]
    assert prompt.length(9) == sum(map(len, texts)) + 27


def test_images_go_where_the_question_marks_them():
    _, texts = build("Is <image> like <image>?", 2)
    assert texts == [f"{BEFORE}Is ", " like ", f"?{AFTER}"]
    _, texts = build("<image><image>", 2)
    assert texts == [BEFORE, "", AFTER]


@pytest.mark.parametrize(
    ("question", "num_images"), [("<image>?", 0), ("<image>?", 2), ("<image> <image>", 1)]
)
def test_marks_and_images_must_be_as_many(question, num_images):
    marked = question.count("<image>")
    with pytest.raises(
        PromptError, match=f"marks {marked} places with <image>, but {num_images} images are given"
    ):
        build(question, num_images)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_the_mode_reaches_the_images(mode):
    image = picture(128, 64)
    prompt = build_prompt("?", [image], Letters(), 64, mode)
    np.testing.assert_array_equal(prompt.images[0], pixel_values(image, 64, mode))
