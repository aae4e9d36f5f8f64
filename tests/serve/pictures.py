"""Pictures as clients send them, honest and hostile."""

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_convert.serve.settings import Settings

SETTINGS = Settings()
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def data_url(raw: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(raw).decode()}"


def noise(mode: str = "RGB", width: int = 31, height: int = 23, seed: int = 0) -> Image.Image:
    """A picture in which no two pixels are likely to be equal."""
    values = np.random.default_rng(seed).integers(0, 65536, (height, width, 4))
    if mode == "I;16":
        return Image.fromarray(values[:, :, 0].astype(np.uint16))
    return Image.fromarray((values & 255).astype(np.uint8), "RGBA").convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes | None = None) -> bytes:
    """A gray PNG of one bit a pixel, black all over; `chunks` come before the pixels."""
    if pixels is None:
        packer = zlib.compressobj(9)
        row = bytes(1 + (width + 7) // 8)
        pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + b"".join(chunks)
        + png_chunk(b"IDAT", pixels)
        + png_chunk(b"IEND", b"")
    )


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with more segments behind its first marker."""
    more = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    return jpeg[:2] + more + jpeg[2:]


def webp_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def webp(*chunks: bytes) -> bytes:
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def canvas(width: int, height: int, flags: int = 2) -> bytes:
    """The chunk that says the size of an extended WebP; by default an animated one."""
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + sizes)


def bombs() -> dict[str, tuple[str, bytes]]:
    """Small files that unfold to hundreds of megabytes in a decoder that trusts them, with their types."""
    small = saved(noise("RGB", 16, 16), "JPEG")
    text = b"Comment\0\0" + zlib.compress(bytes(1_000_000), 9)
    orientation = b"Raw profile type exif\0\0" + zlib.compress(bytes(1_000_000), 9)
    profile = b"icc\0\0" + zlib.compress(bytes(60_000_000), 9)
    frames = [noise("RGB", 64, 64, n) for n in range(40)]
    huge = small.replace(struct.pack(">HH", 16, 16), b"\xff\xff\xff\xff", 1)
    segment = b"ICC_PROFILE\0\x01\xff" + bytes(65_000)
    animated = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    return {
        "169-megapixels": (TYPES["PNG"], png(13_000, 13_000)),
        "gigapixels": (TYPES["PNG"], png(2**31 - 1, 2**31 - 1, pixels=b"")),
        "zTXt": (TYPES["PNG"], png(8, 8, *[png_chunk(b"zTXt", text)] * 60)),
        "zTXt-orientation": (TYPES["PNG"], png(8, 8, *[png_chunk(b"zTXt", orientation)] * 60)),
        "iCCP": (TYPES["PNG"], png(8, 8, png_chunk(b"iCCP", profile))),
        "deflate-behind-the-pixels": (TYPES["PNG"], png(8, 8, pixels=zlib.compress(bytes(100_000_000), 9))),
        "png-chunks": (TYPES["PNG"], png(8, 8, *[png_chunk(b"teXt", b"")] * 100_000)),
        "jpeg-of-gigapixels": (TYPES["JPEG"], huge),
        "jpeg-profile": (TYPES["JPEG"], with_segments(small, *[(0xE2, segment)] * 120)),
        "jpeg-exif": (TYPES["JPEG"], with_segments(small, *[(0xE1, b"Exif\0\0" + bytes(65_000))] * 120)),
        "webp-canvas": (TYPES["WEBP"], webp(canvas(16_000, 16_000), animated[30:])),
        "webp-frames": (TYPES["WEBP"], webp(animated[12:] + animated[44:] * 20)),
        "webp-lossless": (TYPES["WEBP"], webp(webp_chunk(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(40)))),
    }  # fmt: skip
