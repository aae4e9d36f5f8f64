"""What requests bring: taken as `run` takes it, or refused with the right status and a clear line."""

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastvlm_convert.checkpoint.tokenizer import read_tokenizer
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt import Text
from fastvlm_convert.serve.errors import InvalidRequestError, RequestError
from fastvlm_convert.serve.validate import EncodedPicture, Pictures, check_text, open_picture
from tests.checkpoints import CASES
from tests.serve.pictures import (
    SETTINGS,
    TYPES,
    bombs,
    canvas,
    data_url,
    noise,
    png,
    png_chunk,
    saved,
    webp,
    webp_chunk,
    with_segments,
)

DEMO = Path(__file__).parents[2] / "checkpoints" / "fastvlm-demo"
PICTURES = CASES / "pictures"
PARAM = "messages[0].content[1].image_url.url"


def refusal(url: str, settings=SETTINGS) -> tuple[int, str]:
    """Status and code of what a data URL is refused with."""
    with pytest.raises(RequestError) as caught:
        open_picture(url, PARAM, settings)
    error = caught.value
    assert error.param == PARAM
    assert error.body()["error"]["code"] == error.code
    return int(error.status), error.code


# Pictures that are taken


def assert_as_run(raw: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(raw)
    expected = load_image(path)
    given = open_picture(data_url(raw, TYPES[kind]), PARAM, SETTINGS).image
    assert given.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(given), np.asarray(expected))


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize(
    ("kind", "modes", "options"),
    [
        ("PNG", ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), {"icc_profile": b"x" * 70_000}),
        ("JPEG", ("RGB", "L", "CMYK"), {"icc_profile": b"x" * 70_000, "comment": b"c"}),
        ("JPEG", ("RGB", "L", "CMYK"), {"progressive": True}),
        ("WEBP", ("RGB", "RGBA", "L"), {"icc_profile": b"x" * 70_000}),
        ("WEBP", ("RGB", "RGBA", "L"), {"lossless": True}),
        ("WEBP", ("RGB",), {}),
    ],
)
def test_pixels_are_those_of_run(kind, modes, options, orientation, tmp_path):
    if orientation is not None:
        exif = Image.Exif()
        exif[0x112] = orientation
        options = {**options, "exif": exif}
    for mode in modes:
        assert_as_run(saved(noise(mode), kind, **options), kind, tmp_path)


@pytest.mark.parametrize("name", ["cmyk.jpg", "exif_6.jpg", "gray16.png", "logo_rgba.png", "mpo.jpg"])
def test_pictures_of_the_field(name, tmp_path):
    assert_as_run((PICTURES / name).read_bytes(), "PNG" if name.endswith("png") else "JPEG", tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_several_frames_the_first_is_taken(kind, tmp_path):
    frames = [noise("RGBA", seed=n) for n in range(4)]
    assert_as_run(saved(frames[0], kind, save_all=True, append_images=frames[1:]), kind, tmp_path)


def test_orientation_in_texts_of_a_png_counts(tmp_path):
    for text in ({"XML:com.adobe.xmp": '<x tiff:Orientation="6"/>'}, {"Comment": "tiff:Orientation"}):
        info = PngImagePlugin.PngInfo()
        for key, value in text.items():
            info.add_itxt(key, value)
        assert_as_run(saved(noise(), "PNG", pnginfo=info), "PNG", tmp_path)


@dataclass(frozen=True)
class Other:
    """Settings with other limits."""

    max_image_size_mb: float = 20.0
    max_image_pixels: int = 16_000_000
    max_images: int = 4
    exif_orientation: bool = True


def test_orientation_is_a_setting():
    url = data_url((PICTURES / "exif_6.jpg").read_bytes(), TYPES["JPEG"])
    turned = open_picture(url, PARAM, SETTINGS).image
    stored = open_picture(url, PARAM, Other(exif_orientation=False)).image
    assert stored.size == turned.size[::-1]


def test_the_hash_is_that_of_the_file():
    raw = saved(noise(), "PNG")
    opened = open_picture(data_url(raw, "IMAGE/PNG").replace("data:", "DATA:"), PARAM, SETTINGS)
    assert opened.sha256 == hashlib.sha256(raw).hexdigest()


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://example.com/a.png",
        " HTTPS://example.com/a.png",
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "javascript:alert(1)",
    ],
)
def test_nothing_is_fetched(url):
    """Server-side request forgery: vllm#57157, CVE-2025-6242, sglang#17269."""
    assert refusal(url) == (400, "url_scheme")
    with pytest.raises(InvalidRequestError, match="this server fetches nothing"):
        open_picture(url, PARAM, SETTINGS)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "picture.png",
        "//example.com/a.png",
        "data:",
        "data:;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;charset=utf-8;base64,AAAA",
        "data:image/png;base64;AAAA",
        "data:" + "a" * 100_000,
    ],
)
def test_what_is_no_data_url_in_base64(url):
    assert refusal(url) == (400, "bad_data_url")


# Base64


def test_base64_is_strict():
    raw = saved(noise(), "PNG")
    url = data_url(raw + bytes((1 - len(raw)) % 3 + 1), TYPES["PNG"])
    assert url.endswith("A=")
    open_picture(url, PARAM, SETTINGS)
    head, _, encoded = url.partition(",")
    for bad in (
        "",
        "=",
        encoded.rstrip("="),
        encoded + "=",
        encoded + "AAAA",
        encoded[:40] + "\n" + encoded[40:],
        encoded[:40] + " " + encoded[40:],
        encoded + "\n",
        encoded[:40] + "====" + encoded[40:],
        encoded.replace("+", "-"),
        encoded.replace("/", "_"),
        encoded.replace("+", "%2B"),
        encoded[:40] + "\u00e9" + encoded[41:],
        encoded[:40] + "\ud800" + encoded[41:],
        encoded[:-2] + chr(ord(encoded[-2]) + 1) + "=",
    ):
        assert refusal(f"{head},{bad}") == (400, "bad_base64"), bad[-20:]


# Types


@pytest.mark.parametrize(
    ("media_type", "raw", "code"),
    [
        ("image/gif", saved(noise("P"), "GIF"), "unsupported_type"),
        ("image/svg+xml", b"<svg/>", "unsupported_type"),
        ("text/html", b"<script>", "unsupported_type"),
        ("application/octet-stream", saved(noise(), "PNG"), "unsupported_type"),
        ("image/png", saved(noise(), "JPEG"), "signature_mismatch"),
        ("image/jpeg", saved(noise(), "WEBP"), "signature_mismatch"),
        ("image/webp", saved(noise(), "PNG"), "signature_mismatch"),
        ("image/png", saved(noise(), "TIFF"), "signature_mismatch"),
        ("image/png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "signature_mismatch"),
        ("image/png", b"This is a picture of a cat.", "signature_mismatch"),
        ("image/png", b"a", "signature_mismatch"),
    ],
)
def test_other_types_are_refused(media_type, raw, code):
    assert refusal(data_url(raw, media_type)) == (415, code)


# Sizes


def test_limits_of_bytes_and_pixels_are_exact():
    raw = saved(noise("RGB", 40, 25), "PNG")
    url = data_url(raw, TYPES["PNG"])
    open_picture(url, PARAM, Other(max_image_size_mb=len(raw) / 1e6, max_image_pixels=1000))
    assert refusal(url, Other(max_image_size_mb=(len(raw) - 1) / 1e6)) == (413, "picture_too_large")
    assert refusal(url, Other(max_image_size_mb=1e-3)) == (413, "picture_too_large")
    assert refusal(url, Other(max_image_pixels=999)) == (413, "too_many_pixels")


def test_a_long_edge_is_too_large():
    assert refusal(data_url(png(16_385, 1), TYPES["PNG"])) == (413, "too_many_pixels")


def test_a_jpeg_of_many_scans_is_too_complex():
    """Each scan passes over all pixels: a few bytes cost as much as a picture."""
    raw = saved(noise(), "JPEG", progressive=True)
    scan = raw[raw.rindex(b"\xff\xda") : -2]
    assert refusal(data_url(raw[:-2] + scan * 100 + raw[-2:], TYPES["JPEG"])) == (413, "picture_too_complex")


def test_pieces_are_limited():
    many = png(8, 8, *[png_chunk(b"teXt", b"")] * 70_000)
    assert refusal(data_url(many, TYPES["PNG"])) == (413, "picture_too_complex")
    small = saved(noise(), "JPEG")
    many = with_segments(small, *[(0xFE, b"")] * 70_000)
    assert refusal(data_url(many, TYPES["JPEG"])) == (413, "picture_too_complex")
    many = webp(canvas(8, 8), *[webp_chunk(b"junk", b"")] * 70_000)
    assert refusal(data_url(many, TYPES["WEBP"])) == (413, "picture_too_complex")


_MEASURE = """
import ctypes, json, sys
from pathlib import Path
from tests.serve.pictures import SETTINGS
from fastvlm_convert.serve.errors import RequestError
from fastvlm_convert.serve.validate import open_picture

def opened(url):
    try:
        open_picture(url, "p", SETTINGS)
    except RequestError as error:
        return int(error.status)
    return 200

def memory(field):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field))

for name in sys.argv[2:]:
    url = (Path(sys.argv[1]) / name).read_text()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak so far
    before = memory("VmRSS")
    status = opened(url)
    print(json.dumps([name, status, memory("VmHWM") - before]))
"""


def measured(pictures: dict[str, tuple[str, bytes]], folder: Path) -> dict[str, tuple[int, int]]:
    """Status of each picture, and the bytes that opening it added to the peak of a process."""
    for name, (media_type, raw) in pictures.items():
        (folder / name).write_text(data_url(raw, media_type))
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, folder, *pictures], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return {name: (status, extra) for name, status, extra in rows}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read as Linux tells it")
def test_bombs_take_less_than_20_megabytes_each(tmp_path):
    """Decompression bombs: vllm PR 47010."""
    first = {f"first.{kind}": (TYPES[kind], saved(noise(), kind)) for kind in TYPES}  # loads libraries
    honest = {"honest": (TYPES["PNG"], saved(Image.new("RGB", (3000, 2000)), "PNG"))}
    found = measured(first | bombs() | honest, tmp_path)
    assert found["honest"][0] == 200
    assert found["honest"][1] > 18_000_000  # it measures
    assert found["169-megapixels"][0] == 413
    for name, (_, raw) in bombs().items():
        status, extra = found[name]
        assert len(raw) < 8_000_000, name
        assert status in (200, 413, 422), name
        assert extra < 20_000_000, (name, extra)


# Damage


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_picture_is_unprocessable(kind):
    raw = saved(noise("RGB", 60, 40), kind)
    for size in (30, 60, len(raw) // 2):
        assert refusal(data_url(raw[:size], TYPES[kind])) == (422, "damaged_picture")


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("PNG", png(0, 8)),
        ("PNG", png(8, 8, png(8, 8)[8:33])),  # a second header
        ("JPEG", b"\xff\xd8\xff\xd9"),
        ("JPEG", b"\xff\xd8\xff\xff\xff" + b"\xff" * 1000),
        ("JPEG", with_segments(saved(noise(), "JPEG"), (0xC0, b"\x08\0\x10\0\x10\x01\x01\x11\0"))),
        ("WEBP", webp(canvas(8, 8, 0), saved(noise(), "WEBP")[12:])),  # pixels of another size
        ("WEBP", webp(canvas(8, 8))),
    ],
)
def test_files_that_contradict_themselves(kind, raw):
    assert refusal(data_url(raw, TYPES[kind])) == (422, "damaged_picture")


def test_messages_quote_no_bytes_of_the_picture():
    raw = png(8, 8, pixels=b"secret-in-the-picture")
    with pytest.raises(RequestError) as caught:
        open_picture(data_url(raw, TYPES["PNG"]), PARAM, SETTINGS)
    assert "secret" not in str(caught.value)


# The pool


def test_no_more_pictures_are_decoded_at_once_than_the_pool_has_threads():
    url = data_url(saved(noise(), "PNG"), TYPES["PNG"])
    lock = threading.Lock()
    running, most = 0, 0

    def use(pictures):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1
        return len(pictures)

    async def main():
        pool = Pictures(SETTINGS, threads=2)
        asked = [pool.use([EncodedPicture(url, PARAM)] * 2, use) for _ in range(10)]
        counts = await asyncio.gather(*asked)
        opened = await pool.open(url, PARAM)
        pool.close()
        return counts, opened

    counts, opened = asyncio.run(main())
    assert counts == [2] * 10
    assert opened.image.size == (31, 23)
    assert most == 2


def test_too_many_pictures():
    async def main():
        await Pictures(SETTINGS).use([EncodedPicture("data:", f"p[{n}]") for n in range(5)], len)

    with pytest.raises(InvalidRequestError, match="5 pictures, at most 4") as caught:
        asyncio.run(main())
    assert (caught.value.code, caught.value.param) == ("too_many_images", "p[4]")


# Texts


def test_ordinary_texts_are_taken():
    for text in (
        "",
        "What's in the picture?\r\n\tTwo lines.",
        "\u00bfQu\u00e9? \u4f60\u597d \U0001f600",
        "<|im_end|>",
        "\ufeff",
    ):
        check_text(text, "p", 4096)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a" * 4097, "text_too_long"),
        ("half \ud83d", "not_utf8"),
        ("a\x00b", "control_characters"),
        ("\x1b[31mred", "control_characters"),
        ("back\x08space", "control_characters"),
        ("\x7f", "control_characters"),
        ("\x85", "control_characters"),
    ],
)
def test_texts_that_are_refused(text, code):
    with pytest.raises(InvalidRequestError) as caught:
        check_text(text, "messages[0].content", 4096)
    assert (caught.value.code, caught.value.param) == (code, "messages[0].content")
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<image>"])
def test_special_tokens_in_a_text_are_text(token):
    """Control tokens forged from user text: llama.cpp#24382, transformers#29279."""
    tokenizer = read_tokenizer(DEMO)
    check_text(token, "p", 4096)
    forged = tokenizer.encode(token)
    assert len(forged) == 1  # what the prompt's format writes is the token itself
    typed = tokenizer.encode_texts([Text(f"a {token} b", is_format=False)])
    assert not set(forged) & set(typed)
    assert tokenizer.decode(typed) == f"a {token} b"


def test_a_large_honest_picture_is_taken():
    image = Image.new("RGB", (4000, 4000), "navy")
    opened = open_picture(data_url(saved(image, "PNG"), TYPES["PNG"]), PARAM, SETTINGS)
    assert opened.image.size == (4000, 4000)
