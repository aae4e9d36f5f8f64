"""Core ML runs its packages on a Mac; elsewhere, and on request beside it, the interpreter does."""

from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastvlm_convert.exporters.backends import decoder_settings
from fastvlm_convert.exporters.coreml.metadata import metadata_of
from fastvlm_convert.exporters.coreml.paths import FILES, VISION_PACKAGE
from fastvlm_convert.io_names import IMAGE
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.predict.export_plan import ExportPlan, statement_of
from fastvlm_convert.quantized.activations import FLOAT16_TIE, FLOAT32_TIE
from fastvlm_convert.runtime.core_ml import has_core_ml
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.verification.check import Check
from fastvlm_convert.verification.client_files import check_interface
from fastvlm_convert.verification.compare import LOGIT_STAGES, StageGates
from fastvlm_convert.verification.execution import (
    Execution,
    full_gates,
    least_everywhere,
    most_kl_nats,
)
from fastvlm_convert.verification.layers import CandidateValues
from fastvlm_convert.verification.rounding import Encoded, Integers, check_rounding, with_roundings


def coreml_executions(manifest: Manifest, interpret: bool) -> list[Execution]:
    """Core ML itself; interpreted, once in float32 and, where float16 is declared, once rounding to it.

    An encoder that rounds activations is always interpreted: only there can a reference follow (`rounding`).
    """
    gates, recipe = manifest.recipe.gates, manifest.recipe
    declares_float16 = "float16" in (recipe.vision.compute, decoder_settings(recipe, "coreml").compute)
    exact = with_roundings(full_gates(recipe), recipe)
    if not declares_float16 and recipe.coreml.kv_cache == "state":
        cached = dict.fromkeys(LOGIT_STAGES, gates.fp16_cache_min_sqnr_db)
        exact = replace(exact, min_sqnr_db={**exact.min_sqnr_db, **cached})
    least = least_everywhere(gates.device_min_sqnr_db)
    rounded = StageGates(least, False, gates.max_new_tokens, most_kl_nats(recipe))
    rounded = with_roundings(rounded, recipe)
    found = [Execution("Core ML", None, rounded)] if has_core_ml() else []
    if interpret or not found or recipe.vision.activations != "float":
        encoded = Encoded("coreml", manifest, gates.min_sqnr_db, _encode, FLOAT32_TIE)
        judge = partial(check_rounding, encoded)
        found.append(Execution("coreml", "exact", exact, expose=_values, judge=judge))
        if declares_float16:
            coarse = replace(encoded, min_sqnr_db=gates.device_min_sqnr_db, tie=FLOAT16_TIE)
            again = partial(check_rounding, coarse) if recipe.vision.compute == "float16" else None
            found.append(Execution("coreml fp16", "device", rounded, expose=_values, judge=again))
    return [replace(found[0], inspect=partial(_check_packages, manifest)), *found[1:]]


def _values(bundle: Path, manifest: Manifest, candidate: LoadedModel, values: CandidateValues) -> None:
    from fastvlm_convert.runtime.coreml_session import CoreMLSession
    from fastvlm_convert.runtime.coreml_values import coreml_values

    del bundle, manifest
    assert isinstance(candidate.session, CoreMLSession)
    coreml_values(candidate.session, values.reference.inputs_of(candidate), values.add)


def _encode(bundle: Path, candidate: LoadedModel, given: np.ndarray) -> tuple[Integers, np.ndarray]:
    from fastvlm_convert.runtime.coreml_session import CoreMLSession
    from fastvlm_convert.runtime.coreml_values import encoder_integers

    del bundle
    assert isinstance(candidate.session, CoreMLSession)
    return encoder_integers(candidate.session, given)


def _check_packages(manifest: Manifest, bundle: Path, plan: ExportPlan) -> list[Check]:
    """What the packages say of themselves: metadata that apps read, and the layout of pictures.

    Raises:
        BundleError: A package is damaged.
        MissingDependencyError: coremltools is not installed.
    """
    first = [PurePosixPath(a.files[0]) for a in manifest.artifacts if a.target == "coreml"]
    packages = dict.fromkeys(str(file.parent) for file in first if file.name == FILES[0])
    return [_check_package(bundle, package, plan) for package in packages]


def _check_package(bundle: Path, name: str, plan: ExportPlan) -> Check:
    from fastvlm_convert.runtime.coreml_interface import described

    said = metadata_of(name, statement_of(plan), plan.recipe)
    expected: dict[str, Any] = {"description": said.description, "license": said.license, **said.details}
    if name == VISION_PACKAGE and plan.recipe.coreml.image_input == "image":
        size = plan.contract.image_size
        expected[IMAGE] = f"RGB image, {size} x {size}"
    found = described(bundle / name)
    return check_interface("coreml", Path(name).stem, expected, {key: found.get(key) for key in expected})
