"""What requests bring: texts and pictures, checked before anything is done with them.

Pictures come in data URLs alone: nothing is ever fetched, so that nobody can make the server read addresses
that only it can reach.
"""

import asyncio
import binascii
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import filetype
from PIL import Image

from fastvlm_convert.pictures import DAMAGE, MAX_IMAGE_EDGE, as_seen
from fastvlm_convert.serve.errors import (
    InvalidRequestError,
    RequestError,
    TooLargeError,
    UnprocessableError,
    UnsupportedMediaError,
)
from fastvlm_convert.serve.picture_files import (
    ExcessivePictureError,
    MalformedPictureError,
    PictureFormat,
    picture_file,
)

FORMATS: Final[dict[str, PictureFormat]] = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",  # no registered type, but what many clients write
    "image/webp": "WEBP",
}
"""Media types that a data URL may declare, and Pillow's names."""
BYTES_PER_MB: Final = 1_000_000
DECODERS: Final = 2  # a picture of 16 megapixels takes some 200 MB while it is decoded

_DETECTED: Final = {"image/png": "PNG", "image/apng": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
_HEAD: Final = re.compile(r"data:([a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,80});base64,", re.IGNORECASE)
_SCHEME: Final = re.compile(r"\s{0,8}([a-z][a-z0-9.+-]{0,20}):", re.IGNORECASE)
_BASE64_BLOCK: Final = 4 << 16
_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_TAKEN: Final = "PNG, JPEG and WebP pictures are taken"
_EXAMPLE: Final = "data:image/png;base64,iVBORw0KGgo..."

T = TypeVar("T")


class PictureSettings(Protocol):
    """The settings that pictures depend on; `serve.settings.Settings` has them."""

    @property
    def max_image_size_mb(self) -> float:
        """Most millions of bytes of a picture's file."""

    @property
    def max_image_pixels(self) -> int:
        """Most pixels of a picture."""

    @property
    def max_images(self) -> int:
        """Most pictures of a request."""

    @property
    def exif_orientation(self) -> bool:
        """Whether pictures are turned as their metadata say."""


@dataclass(frozen=True)
class DecodedPicture:
    """A picture that passed all checks.

    Attributes:
        image: RGB, equal to what `pictures.load_image` gives for the same file.
        sha256: Of the file's bytes, in hexadecimal.
    """

    image: Image.Image
    sha256: str


@dataclass(frozen=True)
class EncodedPicture:
    """A picture as a request brings it.

    Attributes:
        url: A data URL.
        param: Where it stands, as `messages[0].content[1].image_url.url`.
    """

    url: str
    param: str


class Pictures:
    """Checks and decodes pictures, a few at a time, whatever the number of requests."""

    def __init__(self, settings: PictureSettings, threads: int = DECODERS) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        Image.preinit()  # registers formats, which must not happen in two threads at once

    async def open(self, url: str, param: str) -> DecodedPicture:
        """Check and decode one picture.

        Raises:
            RequestError: As `open_picture`.
        """
        return await self.use([EncodedPicture(url, param)], lambda pictures: pictures[0])

    async def use(
        self, encoded: Sequence[EncodedPicture], function: Callable[[Sequence[DecodedPicture]], T]
    ) -> T:
        """Decode the pictures of one request and call a function with them, in one thread of the pool.

        Decoded pictures take three bytes a pixel. Where the function returns something smaller, such as a
        prepared prompt, no more of them exist at a time than the pool has threads.

        Raises:
            RequestError: As `open_picture`, or there are too many; whatever the function raises.
        """
        check_number(encoded, self._settings)

        def work() -> T:
            return function([open_picture(each.url, each.param, self._settings) for each in encoded])

        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Let the threads end once what they do is done."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def check_number(encoded: Sequence[EncodedPicture], settings: PictureSettings) -> None:
    """See that a request has no more pictures than are allowed.

    Raises:
        InvalidRequestError: It has.
    """
    limit = settings.max_images
    if len(encoded) > limit:
        raise InvalidRequestError(
            f"the request has {len(encoded)} pictures, at most {limit} are taken",
            param=encoded[limit].param,
            code="too_many_images",
        )


def open_picture(url: str, param: str, settings: PictureSettings) -> DecodedPicture:
    """Check and decode the picture in a data URL.

    Raises:
        InvalidRequestError: It is no data URL, or not strict base64.
        UnsupportedMediaError: It is of a format that is not taken, or not of the declared one.
        TooLargeError: Its file, its pixels or the number of its parts exceed a limit.
        UnprocessableError: It is damaged.
    """
    try:
        return _opened(url, param, settings)
    except RequestError as error:
        error.evidence = error.evidence or (sha256_of(url),)
        raise


def sha256_of(text: str) -> str:
    """SHA-256 of a text that a client sent, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _opened(url: str, param: str, settings: PictureSettings) -> DecodedPicture:
    """As `open_picture`."""
    declared, raw = _decode_url(url, param, settings)
    digest = hashlib.sha256(raw).hexdigest()
    try:
        return DecodedPicture(_checked(raw, declared, param, settings), digest)
    except RequestError as error:
        error.evidence = (digest,)
        raise


def _checked(raw: bytearray, declared: PictureFormat, param: str, settings: PictureSettings) -> Image.Image:
    """The picture in a file of a declared format."""
    detected = _DETECTED.get(filetype.guess_mime(raw[:8192]) or "")
    if detected != declared:
        found = "of another format" if detected is None else f"a {detected}"
        raise UnsupportedMediaError(
            f"the data URL declares a {declared}, but its bytes are {found}; {_TAKEN}",
            param=param,
            code="signature_mismatch",
        )
    try:
        file = picture_file(raw, declared)
    except MalformedPictureError as error:
        raise _damaged(str(error), param) from error
    except ExcessivePictureError as error:
        raise TooLargeError(f"the picture is not taken: {error}", param, "picture_too_complex") from error
    _check_pixels(file.width, file.height, param, settings.max_image_pixels)
    size = (file.width, file.height)
    return _decode(file.content, declared, size, param, settings)


def check_url(url: str, param: str, settings: PictureSettings) -> tuple[PictureFormat, int]:
    """The declared format of a data URL, of which nothing is decoded, and where its base64 begins.

    Raises:
        InvalidRequestError: It is no data URL.
        UnsupportedMediaError: It is of a format that is not taken.
        TooLargeError: Its file exceeds the limit.
    """
    head = _HEAD.match(url)
    media_type = "" if head is None else head[1].lower()
    error: RequestError
    if head is None:
        error = _no_data_url(url, param)
    elif media_type not in FORMATS:
        error = UnsupportedMediaError(f"{media_type} is not taken; {_TAKEN}", param, "unsupported_type")
    elif (len(url) - head.end()) // 4 * 3 - 2 > int(settings.max_image_size_mb * BYTES_PER_MB):
        error = _too_many_bytes(param, settings)
    else:
        return FORMATS[media_type], head.end()
    error.evidence = (sha256_of(url),)
    raise error


def _decode_url(url: str, param: str, settings: PictureSettings) -> tuple[PictureFormat, bytearray]:
    """The declared format and the bytes of a data URL."""
    declared, start = check_url(url, param, settings)
    try:
        raw = _decode_base64(url, start)
    except ValueError as error:
        raise InvalidRequestError(
            "the picture is not in strict base64: the letters A-Z a-z 0-9 + /, padded with =, no spaces",
            param=param,
            code="bad_base64",
        ) from error
    if len(raw) > int(settings.max_image_size_mb * BYTES_PER_MB):
        raise _too_many_bytes(param, settings)
    return declared, raw


def _decode_base64(text: str, start: int) -> bytearray:
    """Bytes of the strict base64 that begins at a place of a text, in blocks so that no copy of it is made.

    Raises:
        ValueError: It has other characters, no or wrong padding, or bits beyond its last byte.
    """
    if start == len(text) or 0 <= text.find("=", start) < len(text) - 2:
        raise ValueError("it is empty, or padded in its middle")
    raw = bytearray((len(text) - start + 3) // 4 * 3)
    end = 0
    for place in range(start, len(text), _BASE64_BLOCK):
        block = binascii.a2b_base64(text[place : place + _BASE64_BLOCK], strict_mode=True)
        raw[end : end + len(block)] = block
        end += len(block)
    del raw[end:]
    if binascii.b2a_base64(raw[-(len(raw) % 3 or 3) :], newline=False).decode() != text[-4:]:
        raise ValueError("bits beyond the last byte are not zero, so the same bytes have another encoding")
    return raw


def _no_data_url(url: str, param: str) -> InvalidRequestError:
    scheme = _SCHEME.match(url)
    if scheme is not None and scheme[1].lower() != "data":
        return InvalidRequestError(
            f"'{scheme[1].lower()}:' is not taken: this server fetches nothing; send the picture itself as "
            f"{_EXAMPLE}",
            param=param,
            code="url_scheme",
        )
    return InvalidRequestError(
        f"a picture is a data URL in base64, as {_EXAMPLE}", param=param, code="bad_data_url"
    )


def _too_many_bytes(param: str, settings: PictureSettings) -> TooLargeError:
    message = f"the picture's file is larger than {settings.max_image_size_mb:g} MB; save it smaller"
    return TooLargeError(message, param, "picture_too_large")


def _check_pixels(width: int, height: int, param: str, limit: int) -> None:
    if width * height > limit or max(width, height) > MAX_IMAGE_EDGE:
        raise TooLargeError(
            f"the picture has {width} x {height} pixels; at most {limit} in all and {MAX_IMAGE_EDGE} an edge "
            "are taken; scale it down",
            param,
            "too_many_pixels",
        )
    if not width or not height:
        raise _damaged("it has no pixels", param)


def _decode(
    content: bytes, kind: PictureFormat, size: tuple[int, int], param: str, settings: PictureSettings
) -> Image.Image:
    """A picture whose file was looked through.

    Args:
        content: The file.
        kind: Its format.
        size: What its header says.
        param: Where it stands in the request.
        settings: Says whether to turn it.
    """
    try:
        with Image.open(io.BytesIO(content), formats=(kind,)) as image:
            if image.size != size:
                raise _damaged("its headers contradict each other", param)
            return as_seen(image, exif_orientation=settings.exif_orientation)
    except (*DAMAGE, Image.DecompressionBombError) as error:
        # Pillow's own words may quote the file.
        raise _damaged("its bytes make no picture", param) from error


def _damaged(reason: str, param: str) -> UnprocessableError:
    return UnprocessableError(
        f"the picture cannot be decoded: {reason}; save it again", param=param, code="damaged_picture"
    )


def check_text(text: str, param: str, max_chars: int) -> None:
    """See that a text is one that a person can have typed.

    Special tokens of the model are taken: the tokenizer reads them as ordinary text.

    Args:
        text: Of a message.
        param: Where it stands.
        max_chars: Most characters.

    Raises:
        InvalidRequestError: It is too long, or has control characters or halves of characters.
    """
    if len(text) > max_chars:
        what, code = f"the text has {len(text)} characters, at most {max_chars} are taken", "text_too_long"
    elif found := _SURROGATE.search(text):
        what = f"the text has half of a character at {found.start()}; encode it as UTF-8"
        code = "not_utf8"
    elif found := _CONTROL.search(text):
        what = (
            f"the text has the control character U+{ord(found[0]):04X} at {found.start()}; of these only "
            "tab, line feed and carriage return are taken"
        )
        code = "control_characters"
    else:
        return
    raise InvalidRequestError(what, param, code, evidence=(sha256_of(text),))
