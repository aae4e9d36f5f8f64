"""What every exporter is given, and how floats leave it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.io_names import COMPONENTS, Component, FloatName, PrecisionName, precision_name
from fastvlm_convert.manifest import Contract
from fastvlm_convert.progress import OnShare
from fastvlm_convert.quantized.weight import MixedSource, StoredWeight
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import FloatSettings
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.parts import Part, part_of
from fastvlm_convert.weights.storage import to_storage

OnBytes = Callable[[int], None]  # the size of weights as they are written, counted as float32

# The parts whose integers name a component's precision.
_NAMED_BY: dict[Component, tuple[Part, ...]] = {
    "vision": ("vision", "projector"),
    "embed": ("embedding",),
    "decoder": ("decoder",),
}


@dataclass(frozen=True)
class Statement:
    """What a bundle's files say of the model.

    Attributes:
        contract: What the bundle promises its users.
        license: Text of the model's license, or that there is none.
    """

    contract: Contract
    license: str


@dataclass(frozen=True)
class ExportJob:
    """A model to lower, and how.

    Attributes:
        config: Dimensions, with the image size to export.
        weights: Canonical names, folded, quantized where the recipe says so.
        recipe: Precisions and settings.
        contract: What the bundle promises its users.
        license: Text of the model's license, or that there is none.
        folder: The bundle under construction.
        on_progress: Called with the share of the weights written, 0..1.
    """

    config: ModelConfig
    weights: MixedSource
    recipe: Recipe
    contract: Contract
    license: str
    folder: Path
    on_progress: OnShare


def precisions_of(
    weights: MixedSource, recipe: Recipe, decoder: FloatSettings
) -> dict[Component, PrecisionName]:
    """What transformers.js calls each component's precision.

    One name that a user gives there opens all three files. So components with integers are called what the
    decoder is called, whatever width their own integers have; floats beside them, or integers beside a
    decoder in floats, keep names of their own.

    Args:
        weights: Canonical names.
        recipe: Precisions of the others.
        decoder: Precision of the decoder on the target.
    """
    bits = {component: _fewest_bits(component, weights) for component in COMPONENTS}
    floats: dict[Component, tuple[FloatName, FloatName]] = {
        "vision": (recipe.vision.storage, recipe.vision.compute),
        "embed": (recipe.embed.storage, decoder.compute),
        "decoder": (decoder.storage, decoder.compute),
    }
    own = {component: precision_name(*floats[component], bits[component]) for component in COMPONENTS}
    if bits["decoder"] is None:
        return own
    return {component: own["decoder" if bits[component] else component] for component in COMPONENTS}


def _fewest_bits(component: Component, weights: MixedSource) -> int | None:
    found = [
        weight.scheme.bits
        for name, weight in weights.items()
        if isinstance(weight, StoredWeight) and part_of(name) in _NAMED_BY[component]
    ]
    return min(found, default=None)


def stored_chunks(
    chunks: Iterable[np.ndarray], dtype: FloatName, name: str, on_bytes: OnBytes
) -> Iterator[np.ndarray]:
    """Chunks of float32 in the dtype of a file, counted as they are taken.

    Raises:
        RecipeError: A value is beyond float16's range.
        CheckpointError: A value is not finite, or cannot be read.
    """
    for chunk in chunks:
        yield to_storage(chunk, dtype, name)
        on_bytes(4 * chunk.size)


class ByteCounter:
    """Turns bytes of weights written into progress.

    Args:
        job: Whose weights are written.
    """

    def __init__(self, job: ExportJob) -> None:
        self._on_progress = job.on_progress
        self._total = 4 * sum(num_elements(weight.shape) for weight in job.weights.values())
        self._done = 0

    def add(self, count: int) -> None:
        """Count bytes, as float32."""
        self._done += count
        self._on_progress(min(1.0, self._done / self._total))
