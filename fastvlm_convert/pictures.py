"""Picture files -> RGB images, as a person sees them: upright, opaque, eight bits a channel.

The original FastVLM code calls `Image.open(file).convert("RGB")`. Where that is not what a person sees (a
photo on its side, sixteen-bit gray turned white, a black logo on transparent ground turned all black), the
person's view wins; docs/pictures.md lists the differences.
"""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Final

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from fastvlm_convert.errors import ImageError
from fastvlm_convert.regular_file import UnreadableFileError, open_file

# Pillow's names; MPO is read as JPEG. Others run interpreters (EPS) or have no defined look (FITS).
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
HEIC_SUFFIXES: Final = (".heic", ".heif")
PICTURE_SUFFIXES: Final = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".mpo", ".gif", ".tif", ".tiff", ".avif", *HEIC_SUFFIXES,
)  # fmt: skip
MAX_PIXELS: Final = 64_000_000
MAX_FILE_BYTES: Final = 1 << 30
# A longer edge would make more than 268 million pixels of a padded square.
MAX_IMAGE_EDGE: Final = 1 << 14

# What Pillow raises for damaged files.
DAMAGE: Final = (OSError, RuntimeError, ValueError, SyntaxError, EOFError, MemoryError, struct.error)

_HEIC_BRANDS: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# By EXIF orientation.
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE: Final = (255, 255, 255)
_SIXTEEN_BITS: Final = 65535


def load_image(path: Path) -> Image.Image:
    """Decode a picture to RGB.

    EXIF orientation is applied, transparency is laid on white, sixteen-bit gray is scaled to eight bits, and
    of several frames or pages the first is taken.

    Raises:
        ImageError: The file is missing, not a picture of a supported format, damaged, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; errors are enough
            with _open(path) as image:
                _check_size(*image.size, path)
                return as_seen(image)
    except FileNotFoundError as error:
        raise ImageError("there is no such image", where=path, hint="check the path") from error
    except UnreadableFileError as error:
        raise ImageError(
            f"the image cannot be decoded: {error.strerror}", where=path, hint="give an image file"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            "not an image, or of a format that is not supported",
            where=path,
            hint=f"supported: {', '.join(FORMATS)}, and HEIC with the extra 'heic'; convert it to PNG",
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(f"more than {MAX_PIXELS // 1_000_000} megapixels", path) from error
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"the image cannot be decoded: {reason}", where=path, hint="is the file complete? copy it again"
        ) from error


def is_picture(path: Path) -> bool:
    """Whether a file is a picture of a supported format, by its first bytes."""
    try:
        with _open(path):
            return True
    except ImageError:  # HEIC, whose reader is not installed; a picture all the same
        return True
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return False


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """The picture in a file, not decoded yet.

    Raises:
        OSError: The file is missing, or no regular file of a sane size.
        ImageError: It is HEIC, and the extra is not installed.
    """
    with open_file(path, MAX_FILE_BYTES) as file:
        # An ISO base media file, whose brand says which codec; AVIF and videos have others.
        head = file.read(12)
        is_heic = head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS
        file.seek(0)
        Image.init()  # registers the less common formats, which `formats` may then name
        with Image.open(file, formats=(*FORMATS, *_heif(path)) if is_heic else FORMATS) as image:
            yield image


def _heif(path: Path) -> tuple[str, ...]:
    """Pillow's name of HEIC, registered.

    Raises:
        ImageError: The extra is not installed.
    """
    try:
        import_module("pillow_heif").register_heif_opener()
    except ModuleNotFoundError as error:
        raise ImageError(
            "HEIC pictures need pillow-heif, which is not installed",
            where=path,
            hint="pip install '.[heic]' in a clone of fastvlm-convert, or convert the picture to JPEG",
        ) from error
    return ("HEIF",)


def _check_size(width: int, height: int, path: Path) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} x {height} pixels", path)
    if max(width, height) > MAX_IMAGE_EDGE:
        raise _too_large(f"{width} x {height} pixels, at most {MAX_IMAGE_EDGE} an edge are accepted", path)


def _too_large(what: str, path: Path) -> ImageError:
    return ImageError(
        f"the image is absurdly large: {what}",
        where=path,
        hint=f"at most {MAX_PIXELS // 1_000_000} megapixels are accepted; scale it down first",
    )


def as_seen(image: Image.Image, *, exif_orientation: bool = True) -> Image.Image:
    """The first frame of a picture in RGB, upright, on white where it is transparent.

    Args:
        image: The picture, decoded or not.
        exif_orientation: Whether to turn it as its metadata say.

    Raises:
        ValueError: Its gray values have no defined white.
    """
    upright = _upright(image) if exif_orientation else image
    if upright.mode.startswith("I") or upright.mode == "F":
        return _eight_bits(upright).convert("RGB")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    ground = Image.new("RGBA", upright.size, (*_WHITE, 255))
    return Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """A picture turned as its metadata say.

    `ImageOps.exif_transpose` also writes the metadata again, and fails where they are odd.
    """
    image.load()  # metadata may stand behind the pixels
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen-bit gray scaled to eight bits, white where it is transparent.

    Raises:
        ValueError: The values are beyond sixteen bits, so what is white is not known.
    """
    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > _SIXTEEN_BITS:
        raise ValueError("gray values beyond 16 bits have no defined white")
    scaled = (values.astype(np.uint32) * 255 + _SIXTEEN_BITS // 2) // _SIXTEEN_BITS
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled = np.where(values == transparent, 255, scaled)
    return Image.fromarray(scaled.astype(np.uint8))
