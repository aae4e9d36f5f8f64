"""ONNX Runtime runs ONNX."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from fastvlm_convert.errors import BundleError, MissingDependencyError
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.predict.export_plan import ExportPlan
from fastvlm_convert.quantized.activations import FLOAT32_TIE
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.verification.answers import KnownEncoder
from fastvlm_convert.verification.check import Check, equal, not_run
from fastvlm_convert.verification.compare import LOGIT_STAGES
from fastvlm_convert.verification.execution import Execution, full_gates
from fastvlm_convert.verification.layers import CandidateValues
from fastvlm_convert.verification.onnx_graph import check_accuracy_level
from fastvlm_convert.verification.rounding import Encoded, Integers, check_rounding, with_roundings

_MERGED: Final = ("merged_embeds", "token_rows")
_MERGED_TEXT: Final = 1000  # ids of text on either side of the features
_EXACT_TOKENS = 4  # 8-bit matrices without int8 activations run hundreds of times slower


def onnx_executions(manifest: Manifest, interpret: bool) -> list[Execution]:
    """The graphs as they are shipped; quantized ones once more without rounding activations.

    As shipped, MatMulNBits rounds activations to int8; without that, the lowering must be exact. An encoder
    that rounds activations itself is compared with a reference that follows (`rounding`).
    """
    del interpret
    recipe = manifest.recipe
    full, inspect = full_gates(recipe), partial(_inspect, manifest)
    encoded = Encoded("onnx", manifest, recipe.gates.min_sqnr_db, partial(_encode, manifest), FLOAT32_TIE)
    judge = partial(check_rounding, encoded)
    full = with_roundings(full, recipe)
    encoder = KnownEncoder()
    show, show_exact = (partial(_values, encoder=encoder, exact=exact) for exact in (False, True))
    if not recipe.quantize:
        return [Execution("onnx", None, full, expose=show, inspect=inspect)]
    front = {stage: least for stage, least in full.min_sqnr_db.items() if stage not in LOGIT_STAGES}
    shipped = replace(full, min_sqnr_db=front, identical_text=False)
    exact = replace(full, identical_text=False, max_new_tokens=_EXACT_TOKENS)
    # Only the decoder computes otherwise, so what the encoder gave is taken from the other execution.
    return [
        Execution("onnx", None, shipped, None, show, inspect, judge, encoder),
        Execution("onnx exact", "exact", exact, 1, show_exact, encoder=encoder),
    ]


def _encode(
    manifest: Manifest, bundle: Path, candidate: LoadedModel, given: np.ndarray
) -> tuple[Integers, np.ndarray]:
    try:
        from fastvlm_convert.runtime.onnx_values import encoder_integers
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "reading ONNX graphs") from error
    del candidate
    return encoder_integers(bundle, manifest, given)


def _inspect(manifest: Manifest, bundle: Path, plan: ExportPlan) -> list[Check]:
    return [*check_accuracy_level(manifest, bundle, plan), *_check_merge(manifest, bundle, plan)]


def _values(
    bundle: Path,
    manifest: Manifest,
    candidate: LoadedModel,
    values: CandidateValues,
    *,
    encoder: KnownEncoder,
    exact: bool,
) -> None:
    from fastvlm_convert.runtime.onnx_values import Wanted, onnx_values

    reference = values.reference
    wanted = {
        name: Wanted(reference.num_bytes[name], reference.num_rows[name], reference.positions(name))
        for name in reference.names
    }
    inputs = reference.inputs_of(candidate)
    for name, rows in encoder.rows.items():
        values.add_rows(name, rows)
        inputs.pop("vision", None)
    onnx_values(bundle, manifest, inputs, wanted, values, exact=exact)
    encoder.rows = values.rows_of("vision")


def _check_merge(manifest: Manifest, bundle: Path, plan: ExportPlan) -> list[Check]:
    """The embedding that onnxruntime-genai runs, which no session of ours does, against the one that ours do.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    try:
        from fastvlm_convert.runtime.onnx_session import EXECUTED_BY, embed_apart
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "running ONNX bundles") from error
    image, tokens = plan.contract.image_token_id, plan.contract.num_image_tokens
    ids = np.arange(min(_MERGED_TEXT, plan.config.decoder.vocab_size), dtype=np.int64)
    ids = ids[ids != image]
    ids = np.concatenate([ids, np.full(tokens, image), ids[::-1]])
    try:
        text = embed_apart(bundle, manifest, ids)
        features = -1 - np.arange(tokens * text.shape[1], dtype=np.float32).reshape(tokens, -1)
        expected = text.copy()
        expected[ids == image] = features
        pairs = (
            (expected, embed_apart(bundle, manifest, ids, features)),
            (text, embed_apart(bundle, manifest, ids, features[:0])),
        )
    except BundleError as error:
        return [not_run("onnx", *_MERGED, str(error))]
    differing = sum(int((want != found).any(-1).sum()) for want, found in pairs)
    reason = f"{differing} rows are not those of embed_tokens with image features in their places"
    return [equal("onnx", *_MERGED, differing, reason, EXECUTED_BY)]
