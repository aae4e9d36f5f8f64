"""Faults of apps: pictures and prompts that are not prepared as the model was trained."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np

from fastvlm_convert.preprocess import ImageMode
from fastvlm_convert.prompt import Message, Prompt
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.verification.faults.around import Around, around
from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.fault import Wrap

_HALF: Final = (0.5, 0.5, 0.5)


def crop_for_pad(copy: Copy) -> Wrap:
    """Make pictures square in the other way."""

    def wrap(model: LoadedModel) -> LoadedModel:
        mode: ImageMode = "crop" if model.images.mode == "pad" else "pad"
        return _prepared(model, mode=mode)

    return wrap


def swap_channels(copy: Copy) -> Wrap:
    """Hand pictures over as blue, green, red."""
    return lambda model: around(model, _BlueFirst(model.session))


def forget_rescaling(copy: Copy) -> Wrap:
    """Hand values of 0 to 255 over where 0 to 1 are expected."""

    def wrap(model: LoadedModel) -> LoadedModel:
        return _prepared(model, rescale_factor=1.0)

    return wrap


def normalize(copy: Copy) -> Wrap:
    """Normalize pictures with a mean and a deviation of a half, or not at all where they are these."""

    def wrap(model: LoadedModel) -> LoadedModel:
        is_half = model.images.mean == _HALF
        mean, std = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) if is_half else (_HALF, _HALF)
        return _prepared(model, mean=mean, std=std)

    return wrap


def text_before_picture(copy: Copy) -> Wrap:
    """Put the question before the picture."""

    def wrap(model: LoadedModel) -> LoadedModel:
        changed = replace(model, prompt_format=replace(model.prompt_format, images_first=False))
        return _TextFirst(**{field.name: getattr(changed, field.name) for field in fields(changed)})

    return wrap


def _prepared(model: LoadedModel, **changes: Any) -> LoadedModel:  # noqa: ANN401  fields of `ImageSettings`
    """A model whose app prepares pictures in its own way, even where the graph would do it."""
    return replace(model, images=replace(model.images, in_graph=False, **changes))


class _BlueFirst(Around):
    """Pictures arrive with their channels in the other order."""

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> float32 [num_image_tokens, hidden]."""
        return super().encode_image(np.ascontiguousarray(pixel_values[:, ::-1]))


@dataclass(frozen=True)
class _TextFirst(LoadedModel):
    """Messages' parts are written last to first."""

    def conversation(self, messages: Sequence[Message]) -> Prompt:
        """The prompt for a conversation, its parts turned round."""
        return super().conversation([replace(m, content=m.content[::-1]) for m in messages])
