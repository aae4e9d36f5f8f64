"""Damaged pictures of all formats: each is decoded, or refused with a `RequestError`; nothing else happens.

`make soak` tries 100,000 of them, other ones each time; a failure names its seed.
"""

import random
import struct
import zlib
from collections import Counter

import pytest
from PIL import Image, PngImagePlugin

from fastvlm_convert.serve.errors import RequestError
from fastvlm_convert.serve.validate import open_picture
from tests.serve.pictures import SETTINGS, TYPES, data_url, noise, saved

COUNT, SOAK_COUNT = 5000, 100_000
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
_WORDS = (0, 1, 2, 12, 255, 0x7FFF, 0x8000, 0xFFFF, 16_000, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def seeds() -> list[tuple[str, bytes]]:
    """Small pictures that use what their formats offer."""
    exif = Image.Exif()
    exif[0x112] = 6
    exif[0x10E] = "a description"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "text" * 20, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>')
    frames = [noise("RGBA", seed=n) for n in range(3)]
    more = {"save_all": True, "append_images": frames[1:]}
    return [
        ("PNG", saved(noise("RGB"), "PNG", exif=exif, pnginfo=texts, icc_profile=b"i" * 300)),
        ("PNG", saved(noise("P"), "PNG", transparency=3)),
        ("PNG", saved(noise("I;16"), "PNG", transparency=7)),
        ("PNG", saved(noise("1"), "PNG")),
        ("PNG", saved(frames[0], "PNG", **more)),
        ("JPEG", saved(noise("RGB"), "JPEG", exif=exif, icc_profile=b"i" * 300, comment=b"c")),
        ("JPEG", saved(noise("RGB"), "JPEG", progressive=True, restart_marker_blocks=2)),
        ("JPEG", saved(noise("CMYK"), "JPEG")),
        ("JPEG", saved(noise("L"), "JPEG", optimize=True)),
        ("WEBP", saved(noise("RGB"), "WEBP")),
        ("WEBP", saved(noise("RGBA"), "WEBP", lossless=True, exif=exif, icc_profile=b"i" * 300)),
        ("WEBP", saved(frames[0], "WEBP", **more)),
    ]


def damaged(raw: bytes, source: random.Random) -> bytes:
    """One to four changes of a file: bits, bytes, numbers, pieces cut, repeated, moved or put in."""
    data = bytearray(raw)
    for _ in range(source.choice((1, 1, 2, 4))):
        if not data:
            break
        # Headers decide more than pixels.
        place = source.randrange(len(data)) if source.random() < 0.5 else source.randrange(min(len(data), 80))
        length = source.choice((1, 2, 4, 8, 12, 40, 200))
        match source.randrange(9):
            case 0:
                data[place] ^= 1 << source.randrange(8)
            case 1:
                data[place] = source.choice(_INTERESTING)
            case 2:
                data[place : place + 4] = struct.pack(source.choice(("<I", ">I")), source.choice(_WORDS))
            case 3:
                data[place : place + 2] = struct.pack(">H", source.choice(_WORDS) & 0xFFFF)
            case 4:
                del data[place:]
            case 5:
                del data[place : place + length]
            case 6:
                data[place:place] = data[place : place + length] * source.choice((1, 2, 50))
            case 7:
                piece = data[place : place + length]
                del data[place : place + length]
                goal = source.randrange(len(data) + 1)
                data[goal:goal] = piece
            case 8:
                data[place : place + length] = source.randbytes(length)
    return bytes(data)


def with_right_sums(raw: bytes) -> bytes:
    """A damaged PNG whose checksums fit again, so that the damage reaches what reads its chunks."""
    data, place = bytearray(raw), 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        end = place + 12 + length
        if end > len(data):
            break
        data[end - 4 : end] = struct.pack(">I", zlib.crc32(data[place + 4 : end - 4]))
        place = end
    return bytes(data)


def outcomes(count: int, seed: int) -> Counter[int]:
    """How often each status comes of damaged pictures; 200 is one that was decoded."""
    source = random.Random(seed)
    pictures = seeds()
    found: Counter[int] = Counter()
    for number in range(count):
        kind, raw = pictures[number % len(pictures)]
        changed = damaged(raw, source)
        if kind == "PNG" and source.random() < 0.7:
            changed = with_right_sums(changed)
        try:
            opened = open_picture(data_url(changed, TYPES[kind]), "p", SETTINGS)
        except RequestError as error:
            found[int(error.status)] += 1
        except BaseException as error:
            error.add_note(f"picture {number} of seed {seed}")
            raise
        else:
            assert opened.image.mode == "RGB"
            found[200] += 1
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of damaged metadata
def test_damaged_pictures_are_decoded_or_refused(request):
    """An image crashes the process instead of a 4xx: llama.cpp#23331, unsloth#10559."""
    is_soak = request.config.getoption("--soak")
    seed = random.SystemRandom().randrange(2**32) if is_soak else 13
    found = outcomes(SOAK_COUNT if is_soak else COUNT, seed)
    assert set(found) <= {200, 400, 413, 415, 422}
    assert found[200] > 100  # some damage is none to a decoder
    assert found[422] > 100
