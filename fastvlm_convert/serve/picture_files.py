"""PNG, JPEG and WebP files without what their pixels do not depend on, and the size that they claim.

A picture of a few kilobytes can hold metadata that expand to 64 MB, a thousand frames, or a second header
that contradicts the first. So a decoder gets only what the first picture and its orientation need, put
together anew from pieces that were found one by one; ICC profiles, comments, thumbnails and further frames
are left out. `run` ignores those, too, so the pixels are the same.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

PictureFormat = Literal["PNG", "JPEG", "WEBP"]

MAX_PIECES: Final = 1 << 16  # chunks or segments; 20 MB in pieces of 4 kB are 5000
MAX_SCANS: Final = 64  # of a JPEG, each of which passes over the whole picture; encoders write about ten

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS: Final = (b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_ORIENTATION: Final = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_JPEG_EXIF: Final = b"Exif\0\0"
_JPEG_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_TABLES: Final = (0xC4, 0xCC, 0xDB, 0xDD)
_SOI, _EOI, _SOS, _APP0, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
# Neither a stuffed zero nor a restart marker nor filling.
_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_WEBP_PIXELS: Final = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_ORIENTATION: Final = (b"EXIF", b"XMP ")


@dataclass(frozen=True)
class PictureFile:
    """What a decoder needs of a file.

    Attributes:
        width: Pixels, as the header says.
        height: Pixels.
        content: A whole file of the same format.
    """

    width: int
    height: int
    content: bytes


class MalformedPictureError(ValueError):
    """The pieces of a file do not fit together."""


class ExcessivePictureError(ValueError):
    """A file has more pieces or scans than pictures have."""


def picture_file(raw: bytes | bytearray, kind: PictureFormat) -> PictureFile:
    """Take a file apart, without decoding pixels, and put together what a decoder needs.

    Raises:
        MalformedPictureError: The file is cut off in its header, or contradicts itself.
        ExcessivePictureError: It has more pieces than make sense.
    """
    take_apart = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp}[kind]
    try:
        return take_apart(memoryview(raw))
    except (struct.error, IndexError):
        raise MalformedPictureError("the file ends within its header") from None


def _png(raw: memoryview) -> PictureFile:
    head, pieces, metadata = raw[8:33], [], {}
    length, kind, width, height = struct.unpack(">I4sII", raw[8:24])
    if bytes(raw[:8]) != _PNG_SIGNATURE or kind != b"IHDR" or length != 13 or len(head) < 25:
        raise MalformedPictureError("a PNG begins with a header of 13 bytes")
    for kind, body, piece in _png_chunks(raw):
        if kind == b"IHDR":
            raise MalformedPictureError("it has two headers")
        if kind in _PNG_PIXELS:
            pieces.append(piece)
        elif kind == b"eXIf":
            metadata[kind] = piece
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = bytes(body[:80]).partition(b"\0")[0]
            if keyword in _PNG_ORIENTATION:
                metadata[keyword] = piece
    return PictureFile(width, height, b"".join([_PNG_SIGNATURE, head, *metadata.values(), *pieces]))


def _png_chunks(raw: memoryview) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """The type, the content, and the whole of each chunk after the header; the last one may be cut off."""
    start = 33
    for _ in range(MAX_PIECES):
        if start + 8 > len(raw):
            return
        length, kind = struct.unpack(">I4s", raw[start : start + 8])
        end = start + 12 + length
        if end > len(raw) and kind != b"IDAT":
            return
        yield kind, raw[start + 8 : end - 4], raw[start:end]
        if kind == b"IEND":
            return
        start = end
    raise ExcessivePictureError(f"it has more than {MAX_PIECES} chunks")


def _jpeg(raw: memoryview) -> PictureFile:
    if bytes(raw[:2]) != b"\xff\xd8":
        raise MalformedPictureError("a JPEG begins with FF D8")
    size = None
    pieces: list[memoryview] = []
    metadata: dict[object, memoryview] = {}
    start = 2
    for _ in range(MAX_PIECES):
        marker, start = _jpeg_marker(raw, start)
        if marker == _SOS:
            break
        body_start = start + 2
        (length,) = struct.unpack(">H", raw[start:body_start])
        body, start = raw[body_start : start + length], start + length
        if length < 2 or start > len(raw):
            raise MalformedPictureError("a segment reaches beyond the end")
        piece = raw[body_start - 4 : start]
        if marker in _JPEG_FRAMES:
            if size is not None:
                raise MalformedPictureError("it has two headers")
            height, width = struct.unpack(">HH", body[1:5])
            size = width, height
        if marker in _JPEG_FRAMES or marker in _JPEG_TABLES:
            pieces.append(piece)
        elif marker in (_APP0, _APP14):
            metadata[marker] = piece
        elif marker == _APP1 and bytes(body[:6]) == _JPEG_EXIF:
            metadata.setdefault(_JPEG_EXIF, piece)
        elif marker == _APP1 and bytes(body[: len(_JPEG_XMP)]) == _JPEG_XMP:
            metadata[_JPEG_XMP] = piece
    else:
        raise ExcessivePictureError(f"it has more than {MAX_PIECES} segments")
    if size is None:
        raise MalformedPictureError("pixels come before the header")
    scans = raw[start - 2 : _jpeg_end(raw, start)]
    content = b"".join([b"\xff\xd8", *metadata.values(), *pieces, scans])
    return PictureFile(*size, content)


def _jpeg_marker(raw: memoryview, start: int) -> tuple[int, int]:
    """A segment's marker, and where its length stands."""
    if raw[start] != 0xFF:
        raise MalformedPictureError("no segment where one should begin")
    found = _MARKER.search(raw, start)
    # Filling is any number of FF; nothing else may come before the marker.
    if found is None or bytes(raw[start : found.start()]).strip(b"\xff"):
        raise MalformedPictureError("no segment where one should begin")
    marker = found[0][1]
    if marker in (_SOI, _EOI):
        raise MalformedPictureError("it has no pixels")
    return marker, found.end()


def _jpeg_end(raw: memoryview, start: int) -> int:
    """Where a JPEG's first picture ends.

    Raises:
        ExcessivePictureError: It has too many scans.
    """
    scans = 1
    for _ in range(MAX_PIECES):
        found = _MARKER.search(raw, start)
        if found is None:
            return len(raw)
        marker, start = found[0][1], found.end()
        if marker == _EOI:
            return start
        scans += marker == _SOS
        if scans > MAX_SCANS:
            raise ExcessivePictureError(f"it has more than {MAX_SCANS} scans")
        if start + 2 > len(raw):
            return len(raw)
        start += struct.unpack(">H", raw[start : start + 2])[0]
    raise ExcessivePictureError(f"it has more than {MAX_PIECES} segments")


def _webp(raw: memoryview) -> PictureFile:
    if bytes(raw[:4]) != b"RIFF" or bytes(raw[8:12]) != b"WEBP":
        raise MalformedPictureError("a WebP begins with RIFF and WEBP")
    chunks = _webp_chunks(raw)
    kind, body, piece = next(chunks, (b"", raw[:0], raw[:0]))
    size = _webp_size(kind, body)
    pieces = {kind: piece}
    if kind == b"VP8X":
        for kind, _, piece in chunks:
            if kind in _WEBP_PIXELS or kind in _WEBP_ORIENTATION:
                pieces.setdefault(kind, piece)
    content = b"WEBP" + b"".join(pieces.values())
    return PictureFile(*size, b"RIFF" + struct.pack("<I", len(content)) + content)


def _webp_size(kind: bytes, body: memoryview) -> tuple[int, int]:
    """Width and height that a WebP's first chunk says."""
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L" and bytes(body[:1]) == b"\x2f":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and bytes(body[3:6]) == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise MalformedPictureError("a WebP begins with VP8, VP8L or VP8X")


def _webp_chunks(raw: memoryview) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """The type, the content, and the whole of each chunk."""
    start = 12
    for _ in range(MAX_PIECES):
        if start + 8 > len(raw):
            return
        kind, length = struct.unpack("<4sI", raw[start : start + 8])
        end = start + 8 + length + length % 2
        if end > len(raw) + length % 2:
            raise MalformedPictureError("a chunk reaches beyond the end")
        yield kind, raw[start + 8 : start + 8 + length], raw[start:end]
        start = end
    raise ExcessivePictureError(f"it has more than {MAX_PIECES} chunks")
