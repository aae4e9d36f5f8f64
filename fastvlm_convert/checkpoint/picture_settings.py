"""What a checkpoint says of its pictures: size, how they are made square, and normalization.

Apple's code (ml-fastvlm `mobileclip_encoder.py`) reads the size from the vision tower's name and has the
rest written in; transformers keeps it in `preprocessor_config.json`, since version 5 within
`processor_config.json`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from fastvlm_convert.checkpoint.files import read_json
from fastvlm_convert.checkpoint.layouts import Layout
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.io_names import PATCH_SIZE
from fastvlm_convert.preprocess import RESAMPLINGS, ImageMode, ImageSettings, Resampling
from fastvlm_convert.regular_file import is_there
from fastvlm_convert.weights.model_config import ModelConfig

MAX_IMAGE_SIZE: Final = 4096

_NESTED_FILE, _FLAT_FILE = "processor_config.json", "preprocessor_config.json"
_APPLE: Final = "built into Apple's code"
_ZERO, _ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

Setting = Literal["image_size", "image_mode", "resampling", "normalization"]


@dataclass(frozen=True)
class PictureSettings:
    """How the original code turns pictures into pixel values.

    Attributes:
        image: The settings.
        origins: Where each was found.
        notes: What the checkpoint says and this tool does otherwise.
    """

    image: ImageSettings
    origins: Mapping[Setting, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Processor:
    """The settings of transformers' image processor, and the file they stand in."""

    values: Mapping[str, Any]
    file: str
    path: Path

    def fail(self, key: str, expected: str) -> CheckpointError:
        """The error for a key whose value is not what it should be."""
        return CheckpointError(
            f"{key} is {_json_word(self.values.get(key))}, expected {expected}", where=self.path / self.file
        )


def picture_settings(raw: Mapping[str, Any], layout: Layout, path: Path) -> PictureSettings:
    """Read how pictures are prepared.

    Args:
        raw: config.json.
        layout: Whose names and config it uses.
        path: The checkpoint's folder.

    Raises:
        CheckpointError: The image size is not stated or no multiple of 64, or a setting is malformed.
    """
    processor = _read_processor(path)
    if layout == "llava_qwen2":
        return _apple_settings(raw, processor, path)
    return _transformers_settings(raw, processor, path)


def with_pixel_scaling(config: ModelConfig, image: ImageSettings) -> ModelConfig:
    """The same network, told how pixels are scaled before they enter: some programs do that themselves."""
    vision = replace(
        config.vision,
        rescale_factor=image.rescale_factor,
        image_mean=image.mean,
        image_std=image.std,
    )
    return replace(config, vision=vision)


def _read_processor(path: Path) -> _Processor:
    """The image processor; what `processor_config.json` holds goes before a file of its own."""
    for file in (_NESTED_FILE, _FLAT_FILE):
        if not is_there(path / file):
            continue
        values = read_json(path / file)
        if file == _NESTED_FILE:
            values = values.get("image_processor") or {}
        if not isinstance(values, dict):
            raise CheckpointError("image_processor is not an object", where=path / file)
        if values:
            return _Processor(values, file, path)
    return _Processor({}, "config.json", path)


def _apple_settings(raw: Mapping[str, Any], processor: _Processor, path: Path) -> PictureSettings:
    match = re.search(r"_(\d{2,4})$", str(raw.get("mm_vision_tower", "")))
    size = int(match[1]) if match else None
    mode: ImageMode = "pad" if raw.get("image_aspect_ratio", "pad") == "pad" else "crop"
    image = ImageSettings(_checked_size(size, path), mode)
    origins: dict[Setting, str] = {
        "image_size": "config.json: mm_vision_tower",
        "image_mode": "config.json: image_aspect_ratio" if "image_aspect_ratio" in raw else _APPLE,
        "resampling": _APPLE,
        "normalization": _APPLE,
    }
    notes = []
    if processor.values:
        mean, std = _normalization(processor)
        if (mean, std) != (_ZERO, _ONE):
            notes.append(
                f"{processor.file} normalizes pictures (mean {_listed(mean)}, std {_listed(std)}); Apple's "
                "code never reads it, so pictures are not normalized"
            )
    return PictureSettings(image, origins, tuple(notes))


def _transformers_settings(raw: Mapping[str, Any], processor: _Processor, path: Path) -> PictureSettings:
    size, size_origin = _transformers_size(raw, processor)
    mode: ImageMode = "pad" if raw.get("image_aspect_ratio", "pad") == "pad" else "crop"
    mean, std = _normalization(processor)
    image = ImageSettings(
        size=_checked_size(size, path),
        mode=mode,
        resampling=_resampling(processor),
        rescale_factor=_rescale_factor(processor),
        mean=mean,
        std=std,
    )
    stated = "image_aspect_ratio" in raw
    origins: dict[Setting, str] = {
        "image_size": size_origin,
        "image_mode": "config.json: image_aspect_ratio" if stated else "Apple's code, which pads",
        "resampling": _origin(processor, "resample", "transformers' default"),
        "normalization": _origin(processor, "image_mean", "none stated"),
    }
    return PictureSettings(image, origins, () if mode == "crop" else tuple(_square_notes(processor)))


def _origin(processor: _Processor, key: str, default: str) -> str:
    return f"{processor.file}: {key}" if key in processor.values else default


def _square_notes(processor: _Processor) -> list[str]:
    """How transformers would make pictures square, where it would not pad them."""
    size = processor.values.get("size")
    if processor.values.get("do_center_crop"):
        return [
            f"{processor.file} says do_center_crop, so transformers cuts the longer edge; this tool pads as "
            "Apple's code does (common.image_mode: crop in the recipe cuts, too)"
        ]
    if isinstance(size, dict) and "height" in size and "width" in size:
        return [
            f"{processor.file} stretches pictures to a square; this tool keeps their shape and pads as "
            "Apple's code does"
        ]
    return []


def _transformers_size(raw: Mapping[str, Any], processor: _Processor) -> tuple[int | None, str]:
    """The image size and where it was found: the processor's, or what the number of image tokens implies."""
    values = processor.values
    for key in ("crop_size", "size"):
        stated = values.get(key)
        if stated is None or (key == "crop_size" and values.get("do_center_crop") is False):
            continue
        edges = stated if isinstance(stated, dict) else {"height": stated}
        found = next((e for e in ("height", "shortest_edge", "longest_edge") if e in edges), None)
        if found is None:
            continue
        name = f"{key}.{found}" if isinstance(stated, dict) else key
        where = processor.path / processor.file
        if type(edges[found]) is not int:
            raise CheckpointError(f"{name} is {_json_word(edges[found])}, expected an integer", where=where)
        if edges.get("width", edges[found]) != edges[found]:
            raise CheckpointError(
                f"{key} is {edges[found]} by {_json_word(edges['width'])}, expected a square", where=where
            )
        return edges[found], f"{processor.file}: {name}"
    tokens = raw.get("image_seq_length")
    if type(tokens) is int and 0 < tokens < 1 << 24 and math.isqrt(tokens) ** 2 == tokens:
        return math.isqrt(tokens) * PATCH_SIZE, "config.json: image_seq_length"
    return None, ""


def _checked_size(size: int | None, path: Path) -> int:
    where = path / "config.json"
    if size is None:
        raise CheckpointError(
            "the image size is not stated",
            where=where,
            hint="set mm_vision_tower to 'mobileclip_l_SIZE' (Apple), or image_seq_length (transformers)",
        )
    if size % PATCH_SIZE or not PATCH_SIZE <= size <= MAX_IMAGE_SIZE:
        raise CheckpointError(
            f"image size {size} is no multiple of {PATCH_SIZE} up to {MAX_IMAGE_SIZE}", where=where
        )
    return size


def _normalization(processor: _Processor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation by channel; nothing where `do_normalize` is false."""
    if not _flag(processor, "do_normalize"):
        return _ZERO, _ONE
    mean = _channels(processor, "image_mean", _ZERO)
    std = _channels(processor, "image_std", _ONE)
    if min(std) <= 0:
        raise processor.fail("image_std", "positive numbers")
    return mean, std


def _channels(
    processor: _Processor, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = processor.values.get(key)
    if value is None:
        return default
    numbers = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(numbers, list) or len(numbers) != 3 or not all(_is_small(x) for x in numbers):
        raise processor.fail(key, "three numbers")
    red, green, blue = (float(x) for x in numbers)
    return red, green, blue


def _rescale_factor(processor: _Processor) -> float:
    if not _flag(processor, "do_rescale"):
        return 1.0
    value = processor.values.get("rescale_factor", 1 / 255)
    if not _is_small(value) or value <= 0:
        raise processor.fail("rescale_factor", "a positive number")
    return float(value)


def _resampling(processor: _Processor) -> Resampling:
    """Pillow's filter by its number."""
    value = processor.values.get("resample", RESAMPLINGS.index("bicubic"))
    if type(value) is not int or not 0 <= value < len(RESAMPLINGS):
        raise processor.fail("resample", f"a number from 0 to {len(RESAMPLINGS) - 1}")
    return RESAMPLINGS[value]


def _flag(processor: _Processor, key: str) -> bool:
    value = processor.values.get(key)
    if value is not None and not isinstance(value, bool):
        raise processor.fail(key, "true or false")
    return value is not False


def _is_small(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e6


def _listed(values: tuple[float, float, float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _json_word(value: object) -> str:
    """A value as JSON writes it, cut short."""
    words = {True: "true", False: "false", None: "null"}
    return words[value] if isinstance(value, bool | None) else repr(value)[:60]
