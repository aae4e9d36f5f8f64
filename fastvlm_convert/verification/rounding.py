"""Whether an encoder with integer activations rounds as the reference does.

Two correct implementations part wherever a value lies so near to the middle of two integers that the last
bits of its float decide. Each such value is off by a whole step and moves others across their own middle, and
after a few layers two encoders that are equally right have some 30 dB of each other. So the reference
follows: it takes the integer of the target wherever that is the nearest to its own value, or as near within a
small part of a step. What remains is the error of the floats between, unless a scale, an integer or an
operation is wrong.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from fastvlm_convert import metrics
from fastvlm_convert.errors import MissingDependencyError
from fastvlm_convert.io_names import vision_layer_op
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.predict.export_plan import ExportPlan
from fastvlm_convert.quantization.prepared_weights import prepare_weights, remembered_calibration
from fastvlm_convert.quantized.activations import is_in_encoder
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.targets import Target
from fastvlm_convert.verification.check import Check, at_least, not_run
from fastvlm_convert.verification.compare import StageGates
from fastvlm_convert.verification.layers import ReferenceValues

if TYPE_CHECKING:  # torch, which the reference has loaded when this is called
    from torch import Tensor

_WHAT: Final = ("image_features", "followed_sqnr_db")
_APART_DB: Final = 10.0  # less than two right encoders have of each other
_SUFFIXES: Final = {"input": "_input_integers", "output": "_integers"}  # of values in the graph

Integers = Mapping[str, np.ndarray]  # unsigned, by the name of their value in the graph


@dataclass(frozen=True)
class Encoded:
    """How a target encodes a picture.

    Attributes:
        target: Format of the artifact.
        manifest: The bundle's.
        min_sqnr_db: Least signal to noise of image tokens against those of a reference that follows.
        encode: What the target makes of what its encoder takes: what it rounds to, and image tokens, float32
            [num_image_tokens, hidden]. Gets the bundle's folder and the model that runs.
        tie: Of a step, within which the reference follows (`model.static_layer`).
    """

    target: Target
    manifest: Manifest
    min_sqnr_db: float
    encode: Callable[[Path, LoadedModel, np.ndarray], tuple[Integers, np.ndarray]]
    tie: float


def with_roundings(gates: StageGates, recipe: Recipe) -> StageGates:
    """Gates of an execution; that of image tokens is low where only a reference that follows can tell."""
    if recipe.vision.activations == "float":
        return gates
    return replace(gates, min_sqnr_db={**gates.min_sqnr_db, "image_features": _APART_DB})


def check_rounding(
    encoded: Encoded, bundle: Path, plan: ExportPlan, candidate: LoadedModel, values: ReferenceValues
) -> list[Check]:
    """Hold the image tokens of the first picture against those of a reference that follows.

    Args:
        encoded: How the target encodes it.
        bundle: The bundle's folder.
        plan: What an export of the checkpoint would do.
        candidate: The bundle, as the target runs it.
        values: Has the picture.

    Returns:
        One check; none where the encoder's activations are floats.

    Raises:
        BundleError: The runtime refuses the graph.
        MissingDependencyError: torch, or what reads the graph, is not installed.
    """
    if plan.recipe.vision.activations == "float" or plan.checkpoint.quantized is not None:
        return []
    target, manifest = encoded.target, encoded.manifest
    if values.pixel_values is None:
        return [not_run(target, *_WHAT, "no question has a picture")]
    try:
        import torch

        from fastvlm_convert.model.encoder import Encoder
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "running the reference") from error
    given = candidate.unprepared(values.pixel_values)
    integers, features = encoded.encode(bundle, candidate, given)
    prepared = prepare_weights(plan, remembered_calibration(plan, manifest.source.calibration))
    encoder = Encoder(plan.config, {n: w for n, w in prepared.weights.items() if is_in_encoder(n)})
    for layer, module in encoder.static.items():
        operation = vision_layer_op(layer)
        if plan.recipe.vision.computes_in(operation) == "float16":
            module.keep_bias_in_float16()
        module.tie = encoded.tie
        module.follow = partial(_integers, integers, operation)
    expected = encoder.run(torch.from_numpy(values.pixel_values)).numpy()
    value = metrics.sqnr_db(expected, features)
    return [at_least(target, *_WHAT, value, encoded.min_sqnr_db, candidate.session.executed_by)]


def _integers(integers: Integers, operation: str, what: str) -> "Tensor | None":
    """What the target rounded to; None where it has no such integers, which then are not followed."""
    import torch

    found = integers.get(f"{operation}{_SUFFIXES[what]}")
    return None if found is None else torch.from_numpy(found.astype(np.float32))
