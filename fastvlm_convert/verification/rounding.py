"""Whether an encoder with integer activations rounds as the reference does.

Two correct implementations part wherever a value lies so near to the middle of two integers that the last
bits of its float decide. Each such value is off by a whole step and moves others across their own middle, and
after a few layers two encoders that are equally right have some 30 dB of each other. So the reference
follows: it takes the integer of the target wherever that is the nearest to its own value, or as near within a
small part of a step. What remains is the error of the floats between, unless a scale, an integer or an
operation is wrong.
"""

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
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.verification.check import Check, at_least, not_run
from fastvlm_convert.verification.layers import ReferenceValues

if TYPE_CHECKING:  # torch, which the reference has loaded when this is called
    from torch import Tensor

_WHAT: Final = ("onnx", "image_features", "followed_sqnr_db")
_SUFFIXES: Final = {"input": "_input_integers", "output": "_integers"}  # of values in the graph


def check_rounding(
    manifest: Manifest, bundle: Path, plan: ExportPlan, candidate: LoadedModel, values: ReferenceValues
) -> list[Check]:
    """Hold the image tokens of the first picture against those of a reference that follows.

    Args:
        manifest: The bundle's.
        bundle: Its folder.
        plan: What an export of the checkpoint would do.
        candidate: The bundle, as ONNX Runtime runs it.
        values: Has the picture.

    Returns:
        One check; none where the encoder's activations are floats.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        MissingDependencyError: onnx or torch is not installed.
    """
    if plan.recipe.vision.activations == "float" or plan.checkpoint.quantized is not None:
        return []
    if values.pixel_values is None:
        return [not_run(*_WHAT, "no question has a picture")]
    try:
        import torch

        from fastvlm_convert.model.encoder import Encoder
        from fastvlm_convert.runtime.onnx_values import encoder_integers
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "reading ONNX graphs") from error
    given = candidate.unprepared(values.pixel_values)
    integers, features = encoder_integers(bundle, manifest, given)
    prepared = prepare_weights(plan, remembered_calibration(plan, manifest.source.calibration))
    encoder = Encoder(plan.config, {n: w for n, w in prepared.weights.items() if is_in_encoder(n)})
    for layer, module in encoder.static.items():
        module.follow = partial(_integers, integers, vision_layer_op(layer))
    expected = encoder.run(torch.from_numpy(values.pixel_values)).numpy()
    value = metrics.sqnr_db(expected, features)
    return [at_least(*_WHAT, value, plan.recipe.gates.min_sqnr_db, candidate.session.executed_by)]


def _integers(integers: dict[str, np.ndarray], operation: str, what: str) -> "Tensor | None":
    """What the target rounded to; None where it has no such integers, which then are not followed."""
    import torch

    found = integers.get(f"{operation}{_SUFFIXES[what]}")
    return None if found is None else torch.from_numpy(found.astype(np.float32))
