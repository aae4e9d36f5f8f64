"""A projector or an encoder in a file of its own.

LLaVA's pretraining saves `mm_projector.bin`; towers are published alone, by Apple (MobileCLIP, FastViTHD) and
by timm. Names begin with whatever the saving program put there, so parts are found by how they end.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fastvlm_convert.checkpoint.layouts import (
    APPLE_VISION,
    TIMM_VISION,
    Layout,
    canonical_names,
)
from fastvlm_convert.checkpoint.torch_zip import read_torch_zip
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights.safetensors_file import read_safetensors
from fastvlm_convert.weights.source import Weight

_PROJECTOR: Final = re.compile(r"(?:.*\.)?(0|2|linear_1|linear_2|fc1|fc2)\.(weight|bias)")
_LAYERS: Final = {"0": "fc1", "2": "fc2", "linear_1": "fc1", "linear_2": "fc2", "fc1": "fc1", "fc2": "fc2"}
_TOWERS: Final[tuple[tuple[re.Pattern[str], str, Layout], ...]] = (
    (re.compile(r"(?:.*\.)?((?:patch_embed|network|conv_exp)\..*)"), APPLE_VISION, "llava_qwen2"),
    (re.compile(r"(?:.*\.)?((?:stem|stages|final_conv)\..*)"), TIMM_VISION, "fast_vlm"),
)


def read_projector(path: Path) -> dict[str, Weight]:
    """The projector in a file, by canonical name.

    Raises:
        CheckpointError: The file is damaged, or holds no projector of two layers.
    """
    found: dict[str, Weight] = {}
    for name, weight in _read(path).items():
        if match := _PROJECTOR.fullmatch(name):
            found[f"projector.{_LAYERS[match[1]]}.{match[2]}"] = weight
    if len(found) != 4:
        raise CheckpointError(
            f"it holds {len(found)} of a projector's four tensors",
            where=path,
            hint="give the mm_projector.bin that LLaVA's pretraining saved",
        )
    return found


def read_tower(path: Path) -> dict[str, Weight]:
    """The encoder in a file, by canonical name; train-time branches not yet merged.

    Raises:
        CheckpointError: The file is damaged, or holds no FastViTHD.
    """
    tensors = _read(path)
    for pattern, prefix, layout in _TOWERS:
        stored = {prefix + match[1]: w for name, w in tensors.items() if (match := pattern.fullmatch(name))}
        placed = {ours: stored[name] for name, ours in canonical_names(stored, layout).items()}
        if any(name.startswith("vision.stages.") for name in placed):
            return placed
    raise CheckpointError(
        "it holds no FastViTHD: no tensor has a name of Apple's or timm's code",
        where=path,
        hint="give the encoder's state dict as .safetensors, .bin, .pt or .pth",
    )


def _read(path: Path) -> Mapping[str, Weight]:
    """Tensors of a file in either format, whatever it is called."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_zip(path)
