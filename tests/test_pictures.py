"""Picture files, held against Pillow and against what a person sees."""

import struct
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.errors import ImageError
from fastvlm_convert.pictures import MAX_IMAGE_EDGE, MAX_PIXELS, is_picture, load_image

CASES = Path(__file__).parent / "data" / "cases" / "pictures"
DEMO = Path(__file__).parent.parent / "checkpoints" / "fastvlm-demo" / "check_images" / "00.png"


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def assert_looks_like(found: Image.Image, expected: Image.Image, tolerance: float) -> None:
    """Mean difference of the pixels; lossy formats change each a little."""
    assert (found.mode, found.size) == ("RGB", expected.size)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected.convert("RGB")).astype(int))
    assert difference.mean() <= tolerance


# What people have


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_opaque_pictures_are_as_pillow_converts_them(mode, tmp_path):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    picture(20, 10).convert(mode).save(path)
    with Image.open(path) as again:
        assert again.mode == mode
        np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(again.convert("RGB")))


@pytest.mark.parametrize("name", ["cmyk.jpg", "exif_6.jpg", "mpo.jpg", "x.avif"])
def test_the_same_picture_in_other_formats(name):
    """All four were made of one picture; the upright one is what a person sees."""
    assert_looks_like(load_image(CASES / name), load_image(CASES / "mpo.jpg"), 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (20, 10), "blue")
    image.paste("red", (0, 0, 5, 5))  # where a camera that lay on its side put the corner
    image.save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.size == ((20, 10) if orientation < 5 else (10, 20))
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    right, bottom = corners[orientation]
    at = ((loaded.width - 1) * right, (loaded.height - 1) * bottom)
    assert loaded.getpixel(at) == (255, 0, 0)


def test_sixteen_bit_gray_is_scaled():
    with Image.open(CASES / "gray16.png") as stored:
        expected = np.asarray(stored).astype(float) / 257
    loaded = np.asarray(load_image(CASES / "gray16.png")).astype(float)
    assert expected.max() < 250  # Pillow's own conversion makes all of it white
    for channel in range(3):
        assert np.abs(loaded[:, :, channel] - expected).max() <= 0.5


@pytest.mark.parametrize(("value", "gray"), [(0, 0), (128, 0), (129, 1), (257 * 77, 77), (65535, 255)])
def test_sixteen_bits_are_rounded(value, gray, tmp_path):
    for name in ("a.png", "a.tiff"):
        Image.fromarray(np.full((2, 2), value, np.uint16)).save(tmp_path / name)
        assert load_image(tmp_path / name).getpixel((0, 0)) == (gray, gray, gray)


def test_gray_without_a_defined_white_is_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "a.tiff")
    Image.fromarray(np.full((2, 2), 1 << 20, np.int32)).save(tmp_path / "b.tiff")
    for name in ("a.tiff", "b.tiff"):
        with pytest.raises(ImageError, match="beyond 16 bits"):
            load_image(tmp_path / name)


def test_transparency_is_laid_on_white():
    logo = np.asarray(load_image(CASES / "logo_rgba.png"))
    assert (logo[0, 0] == 255).all()
    assert (logo[100, 100] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L", "I;16"])
def test_every_kind_of_transparency(mode, tmp_path):
    path = tmp_path / "a.png"
    if mode in ("P", "RGB", "L"):  # one color stands for nothing
        image = Image.new("RGB", (4, 4), "black").convert(mode)
        image.putpixel((0, 0), {"P": 1, "RGB": (255, 0, 0), "L": 50}[mode])
        image.save(path, transparency={"P": image.getpixel((3, 3)), "RGB": (0, 0, 0), "L": 0}[mode])
    elif mode == "I;16":
        values = np.zeros((4, 4), np.uint16)
        values[0, 0] = 257 * 50
        Image.fromarray(values).save(path, transparency=0)
    else:
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
        image.putpixel((0, 0), (255, 0, 0, 255))
        path = tmp_path / ("a.tiff" if mode == "PA" else "a.png")
        (image if mode == "PA" else image.convert(mode)).save(path)
    loaded = load_image(path)
    assert loaded.getpixel((3, 3)) == (255, 255, 255)
    assert loaded.getpixel((0, 0)) != (255, 255, 255)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_the_first_of_several_frames_is_taken(suffix, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert load_image(tmp_path / f"a.{suffix}").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="the extra is installed")
def test_heic_names_the_extra(tmp_path):
    path = tmp_path / "a.jpg"  # what some apps call it
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(ImageError, match="need pillow-heif") as caught:
        load_image(path)
    assert "pip install 'fastvlm-convert[heic]'" in caught.value.hint


@pytest.mark.skipif(find_spec("pillow_heif") is None, reason="the extra is not installed")
def test_heic(tmp_path):
    from pillow_heif import from_pillow

    from_pillow(picture(64, 48)).save(tmp_path / "a.heic", quality=100)
    assert_looks_like(load_image(tmp_path / "a.heic"), picture(64, 48), 40)


# What is refused


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "avif", "tiff"])
def test_a_truncated_picture_is_an_error(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    picture(60, 40).save(path)
    load_image(path)
    raw = path.read_bytes()
    for size in (0, 1, 10, len(raw) // 2):
        path.write_bytes(raw[:size])
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["eps", "ppm", "ico", "tga", "dds", "pcx", "jp2"])
def test_other_formats_are_refused(suffix, tmp_path):
    path = tmp_path / "a.png"
    picture(16, 16).save(tmp_path / f"a.{suffix}")
    (tmp_path / f"a.{suffix}").rename(path)
    with pytest.raises(ImageError, match="of a format that is not supported") as caught:
        load_image(path)
    assert "JPEG, PNG" in caught.value.hint
    assert not is_picture(path)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("This is a picture of a cat.")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for path, message in (
        (tmp_path / "a.png", "not an image"),
        (tmp_path / "b.png", "there is no such image"),
        (tmp_path / "dangling.png", "a link to .*gone.png, which is missing"),
        (tmp_path / "loop.png", "cannot be decoded: Too many levels of symbolic links"),
        (tmp_path, "it is a folder, not a file"),
        (Path("/dev/zero"), "it is a device, not a file"),
        (Path("a\0b"), "there is no such image"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(path)


def png(width, height):
    """A small file that claims to be a large image."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.parametrize(
    ("width", "height"),
    [(100_000, 100_000), (1 << 30, 1), (1, 60_000), (MAX_IMAGE_EDGE + 1, 10), (8000, MAX_PIXELS // 8000 + 1)],
)
def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(width, height, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height))
    with pytest.raises(ImageError, match="absurdly large") as caught:
        load_image(path)
    assert "64 megapixels" in caught.value.hint


def test_a_large_picture_gives_no_warning(tmp_path, monkeypatch):
    picture(30, 20).save(tmp_path / "a.png")
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 500
    )  # Pillow warns from there, and refuses from twice that
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "a.png").size == (30, 20)
