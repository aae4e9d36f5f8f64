"""The pictures that questions are about, small enough to stand in a page."""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from PIL import Image

from fastvlm_convert.errors import ImageError
from fastvlm_convert.pictures import load_image

_EDGE: Final = 144  # pixels: a little more than the page shows, for dense screens
_QUALITY: Final = 72
_BETWEEN: Final = ", "
_MOST: Final = 4  # pictures of one question
_NO_FOLDER: Final = "not embedded: give the folder of the pictures with --images"
_NOT_THERE: Final = "not in the folder of --images"


@dataclass(frozen=True)
class Picture:
    """A picture on the page.

    Attributes:
        label: What the source calls it.
        uri: A `data:` address with the picture in it; None where it is missing.
        width: Pixels.
        height: Pixels.
        missing: Why it is missing, else None.
    """

    label: str
    uri: str | None
    width: int
    height: int
    missing: str | None


def embedded(
    labels: Iterable[str], generated: Mapping[str, Image.Image], folder: Path | None
) -> dict[str, tuple[Picture, ...]]:
    """Pictures by the labels of questions: a folder's if one is given, else those that this tool generates.

    Args:
        labels: What the sources call them: paths within the folder, with commas between several.
        generated: Pictures that this tool can make again.
        folder: Where the user's pictures lie.
    """
    return {label: tuple(_pictures(label, generated, folder)) for label in dict.fromkeys(labels)}


def _pictures(label: str, generated: Mapping[str, Image.Image], folder: Path | None) -> Iterator[Picture]:
    if folder is not None:
        whole = _read(folder, label)
        names = [label] if isinstance(whole, Image.Image) else label.split(_BETWEEN)
        for name in names[:_MOST]:
            found = _read(folder, name)
            yield _small(name, found) if isinstance(found, Image.Image) else _missing(name, found)
    elif label in generated:
        yield _small(label, generated[label])
    else:
        yield _missing(label, _NO_FOLDER)


def _missing(label: str, reason: str) -> Picture:
    return Picture(label, None, 0, 0, reason)


def _read(folder: Path, label: str) -> Image.Image | str:
    """A picture of the folder, or why there is none; a label that leads elsewhere names none."""
    relative = PurePosixPath(label)
    if relative.is_absolute() or ".." in relative.parts or "\0" in label:
        return _NOT_THERE
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return _NOT_THERE
    try:
        return load_image(path)
    except ImageError as error:
        return error.args[0]


def _small(label: str, image: Image.Image) -> Picture:
    small = image.convert("RGB")
    small.thumbnail((_EDGE, _EDGE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    return Picture(label, f"data:image/jpeg;base64,{data}", *small.size, None)
