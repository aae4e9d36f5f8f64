"""Image -> pixel_values and question -> token ids, exactly as the reference code does it. NumPy and PIL only.

Source: ml-fastvlm `predict.py`, `llava/mm_utils.py` (`expand2square`, `tokenizer_image_token`) and
`llava/conversation.py` (`qwen_2`); transformers' `CLIPImageProcessor`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastvlm_convert.errors import ImageError, PromptError
from fastvlm_convert.io_names import IMAGE_TOKEN, SYSTEM_PROMPT
from fastvlm_convert.regular_file import UnreadableFileError, open_file

ImageMode = Literal["pad", "crop"]

# A longer edge would make more than 268 million pixels (1 GiB) of a padded square. PIL itself refuses
# images of more than 179 million pixels.
MAX_IMAGE_EDGE: Final = 1 << 14
MAX_IMAGE_BYTES: Final = 1 << 30
_CONVERT: Final = "open it in an image editor and save it as PNG or JPEG"
_SCALE: Final = "scale the image down first"

PROMPT_BEFORE: Final = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
PROMPT_AFTER: Final = "<|im_end|>\n<|im_start|>assistant\n"


class TextEncoder(Protocol):
    """What a prompt needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...


def load_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        ImageError: The file is missing, no image, damaged, or absurdly large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large images; errors are enough
            with open_file(path, MAX_IMAGE_BYTES) as file, Image.open(file) as image:
                if max(image.size) > MAX_IMAGE_EDGE:
                    raise ImageError(
                        f"the image is absurdly large: {image.width} x {image.height} pixels, at most "
                        f"{MAX_IMAGE_EDGE} an edge are accepted",
                        where=path,
                        hint=_SCALE,
                    )
                return image.convert("RGB")
    except FileNotFoundError as error:
        raise ImageError("there is no such image", where=path, hint="check the path") from error
    except UnidentifiedImageError as error:
        what = "not an image, or of a format that is not supported"
        raise ImageError(what, where=path, hint=_CONVERT) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image is absurdly large: {error}", where=path, hint=_SCALE) from error
    except UnreadableFileError as error:
        what = f"the image cannot be decoded: {error.strerror}"
        raise ImageError(what, where=path, hint="give an image file") from error
    except (OSError, RuntimeError, ValueError, SyntaxError) as error:  # PIL's, for damaged files
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"the image cannot be decoded: {reason}", where=path, hint=_CONVERT) from error


def square(image: Image.Image, size: int, mode: ImageMode) -> Image.Image:
    """Make an image `size` x `size`: `pad` with black as the reference does, or `crop` the centre.

    `crop` resizes the shorter edge first and crops then, as transformers and Apple's app do; on a wide
    image the content beyond the square is lost.

    Raises:
        ImageError: Cropping would blow a narrow strip up absurdly.
    """
    width, height = image.size
    if mode == "pad":
        edge = max(width, height)
        padded = Image.new("RGB", (edge, edge))
        padded.paste(image, ((edge - width) // 2, (edge - height) // 2))
        return padded.resize((size, size), Image.Resampling.BICUBIC)
    short = min(width, height)
    width, height = size * width // short, size * height // short
    if width * height > MAX_IMAGE_EDGE**2:
        raise ImageError(
            f"an image of {image.width} x {image.height} pixels is too narrow to crop {size} x {size} from it"
        )
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def pixel_values(image: Image.Image, size: int, mode: ImageMode) -> np.ndarray:
    """The vision encoder's input, float32 [1, 3, size, size], RGB in 0..1.

    Args:
        image: An RGB image of any size.
        size: Edge of the encoder's input in pixels.
        mode: How it is made square.
    """
    scaled = np.asarray(square(image, size, mode), np.float64) * (1 / 255)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], np.float32)


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for a model.

    Attributes:
        segments: Token ids of the text, int64; an image stands between consecutive segments.
        images: float32 [1, 3, S, S] each; one fewer than segments.
    """

    segments: tuple[np.ndarray, ...]
    images: tuple[np.ndarray, ...]

    def length(self, tokens_per_image: int) -> int:
        """Tokens the prompt takes in the context."""
        return sum(len(s) for s in self.segments) + tokens_per_image * len(self.images)


def build_prompt(
    question: str, images: Sequence[Image.Image], encoder: TextEncoder, size: int, mode: ImageMode
) -> Prompt:
    """Put a question and its images into the format the model was trained on.

    `<image>` in the question marks where an image goes; without any, all images come first, one a line.

    Args:
        question: The user's text.
        images: RGB images, possibly none.
        encoder: The model's tokenizer.
        size: Edge of the encoder's input in pixels.
        mode: How images are made square.

    Raises:
        PromptError: The question marks another number of images than there are.
        TokenizerError: The tokenizer cannot express the question.
    """
    if IMAGE_TOKEN not in question:
        question = f"{IMAGE_TOKEN}\n" * len(images) + question
    marked = question.count(IMAGE_TOKEN)
    if marked != len(images):
        raise PromptError(
            f"the question marks {marked} places with {IMAGE_TOKEN}, but {len(images)} images are given",
            hint=f"mark one place an image, or leave {IMAGE_TOKEN} out",
        )
    text = f"{PROMPT_BEFORE}{question}{PROMPT_AFTER}"
    # The text around an image is tokenized piece by piece, as the reference does.
    segments = tuple(np.asarray(encoder.encode(s), np.int64) for s in text.split(IMAGE_TOKEN))
    return Prompt(segments, tuple(pixel_values(image, size, mode) for image in images))
