import numpy as np
import pytest
from PIL import Image

from fastvlm_convert import preprocess
from fastvlm_convert.errors import ImageError
from fastvlm_convert.pictures import MAX_IMAGE_EDGE
from fastvlm_convert.preprocess import ImageSettings, pixel_values, square

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


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
    padded = np.asarray(square(image, ImageSettings(64, "pad")))  # the longer edge is 64: nothing is resized
    left, top = (64 - width) // 2, (64 - height) // 2
    np.testing.assert_array_equal(padded[top : top + height, left : left + width], np.asarray(image))
    inside = np.zeros((64, 64), bool)
    inside[top : top + height, left : left + width] = True
    assert (padded[~inside] == 0).all()


@pytest.mark.parametrize(("width", "height"), [(64, 32), (65, 32), (32, 64), (32, 33), (32, 32)])
def test_cropping_takes_the_centre_of_the_longer_edge(width, height):
    image = picture(width, height)
    cropped = np.asarray(
        square(image, ImageSettings(32, "crop"))
    )  # the shorter edge is 32: nothing is resized
    left, top = (width - 32) // 2, (height - 32) // 2
    np.testing.assert_array_equal(cropped, np.asarray(image)[top : top + 32, left : left + 32])


def test_cropping_resizes_by_the_shorter_edge_padding_by_the_longer():
    image = stripes(400, 100)
    cropped = np.asarray(square(image, ImageSettings(50, "crop")))
    assert cropped.shape == (50, 50, 3)
    assert (cropped == GREEN).all()  # what is left and right is lost
    padded = np.asarray(square(image, ImageSettings(100, "pad")))
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
        row = np.asarray(square(Image.fromarray(pixels), ImageSettings(80, mode)))[40, :, 0].astype(int)
        assert row.min() < 60
        assert row.max() > 200
        assert row.min() > 40


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [64, 96])
def test_pixel_values_are_scaled_rgb_planes(mode, size):
    image = Image.new("RGB", (size, size), (255, 51, 0))
    values = pixel_values(image, ImageSettings(size, mode))
    assert values.shape == (1, 3, size, size)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    for plane, value in enumerate((1.0, 0.2, 0.0)):
        assert (values[0, plane] == np.float32(value)).all()


def test_rows_stay_rows():
    image = Image.new("RGB", (64, 64))
    image.paste(RED, (0, 0, 64, 10))
    values = pixel_values(image, ImageSettings(64, "pad"))
    assert values[0, 0, :10].min() == 1
    assert values[0, 0, 10:].max() == 0


def test_a_strip_that_cropping_would_blow_up_is_refused():
    strip = Image.new("RGB", (MAX_IMAGE_EDGE, 1))
    with pytest.raises(ImageError, match=f"{MAX_IMAGE_EDGE} x 1 pixels is too narrow to crop 1024 x 1024"):
        square(strip, ImageSettings(1024, "crop"))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (700, 9), (9, 700)])
@pytest.mark.parametrize("resampling", ["bicubic", "lanczos", "bilinear", "nearest", "box", "hamming"])
def test_padding_in_strips_changes_no_bit(size, resampling, monkeypatch):
    """The padded square of a long picture is never held whole; Pillow's own result is the truth."""
    image, edge = picture(*size), max(size)
    whole = Image.new("RGB", (edge, edge), (12, 25, 51))
    whole.paste(image, ((edge - size[0]) // 2, (edge - size[1]) // 2))
    expected = whole.resize((64, 64), Image.Resampling[resampling.upper()])
    settings = ImageSettings(64, "pad", resampling, mean=(0.05, 0.1, 0.2))
    for pixels in (16_000_000, 7 * edge):
        monkeypatch.setattr(preprocess, "_STRIP_PIXELS", pixels)
        np.testing.assert_array_equal(np.asarray(square(image, settings)), np.asarray(expected))


def test_normalization_is_that_of_transformers():
    """As `CLIPImageProcessor` computes it: rescaled in float64, normalized in float32."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    image = picture(64, 64)
    rescaled = (np.asarray(image).astype(np.float64) * 0.5).astype(np.float32)
    expected = ((rescaled - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(2, 0, 1)
    settings = ImageSettings(64, "crop", rescale_factor=0.5, mean=mean, std=std)
    np.testing.assert_array_equal(pixel_values(image, settings)[0], expected)


def test_padding_takes_the_mean_color():
    settings = ImageSettings(64, "pad", mean=(0.5, 0.25, 1.0))
    padded = np.asarray(square(picture(64, 32), settings))
    assert (padded[0, 0] == (127, 63, 255)).all()  # int(x * 255), as `expand2square` is called
