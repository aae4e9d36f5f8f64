"""Repairs that are changes of weights work in ONNX too; the others are refused."""

from dataclasses import replace

import numpy as np
import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import TargetError
from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.recipe_settings import RepairSettings
from fastvlm_convert.runtime.loaded import load_reference
from tests.bundles import FP16, FP32, export_bundle, open_bundle, recipe
from tests.planted import (
    DEMO,
    answers,
    copy_demo,
    demo_tensors,
    forced_logits,
    plant_key_bias,
    plant_residual,
)

WEIGHTS = RepairSettings(residual_shift=2, rescaled_keys=(1, 2, 3))


def logits_sqnr(model, reference) -> list[float | None]:
    pairs = zip(forced_logits(reference, reference), forced_logits(model, reference), strict=True)
    return [sqnr_db(a, b) for a, b in pairs]


def test_exact_in_float32(tmp_path):
    bundle = export_bundle(DEMO, tmp_path / "bundle", replace(recipe(FP32), repairs=WEIGHTS))
    reference = load_reference(open_checkpoint(DEMO))
    assert min(logits_sqnr(open_bundle(bundle), reference)) >= 100


def test_onnx_runtime_hides_half_of_it(tmp_path):
    """On x86 its float16 attention sums in float32: scores beyond 65504 pass, residual sums do not."""
    checkpoint = copy_demo(tmp_path, plant_key_bias(plant_residual(demo_tensors())))
    reference = load_reference(open_checkpoint(checkpoint))
    plain = open_bundle(export_bundle(checkpoint, tmp_path / "plain", recipe(FP16)))
    assert np.isnan(logits_sqnr(plain, reference)).all()
    settings = replace(recipe(FP16), repairs=WEIGHTS)
    model = open_bundle(export_bundle(checkpoint, tmp_path / "repaired", settings))
    assert answers(model) == answers(reference)


@pytest.mark.parametrize("setting", ["float32_scores", "separate_key_bias"])
def test_what_attention_cannot_do_is_refused(setting, tmp_path):
    with pytest.raises(TargetError, match=rf"repairs\.{setting} is set, which only Core ML") as caught:
        export_bundle(DEMO, tmp_path / "bundle", recipe(FP16, repairs={setting: (0,)}))
    assert f"leave repairs.{setting} empty" in caught.value.hint
    assert not (tmp_path / "bundle").exists()
