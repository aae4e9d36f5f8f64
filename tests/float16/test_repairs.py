"""The rules by which a scan becomes repairs, one by one."""

from dataclasses import replace

import pytest
import yaml

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.float16.repairs import (
    at_risk,
    missing_repairs,
    needed_repairs,
    recipe_text,
    repaired_recipe,
    settings_of,
)
from fastvlm_convert.float16.report import OpRange, RangeReport
from fastvlm_convert.recipe import Recipe, load_recipe
from fastvlm_convert.recipe_settings import RepairSettings
from tests.bundles import FP16, FP32, recipe

HARMLESS = {
    "attn_scores": 100.0, "q_rotated": 10.0, "k_rotated": 10.0, "k_unbiased": 9.0, "v_heads": 5.0, "qkv": 9.0,
    "o": 3.0, "attn_residual": 20.0, "gated": 30.0, "down": 15.0, "residual": 30.0,
}  # fmt: skip


def report(**sizes: float) -> RangeReport:
    """Two layers with harmless sizes, except for those given: `l1_residual=1e5`."""
    ops = {"stem_0": 2.0, "s3b0_attn_scores": 50.0}
    ops |= {f"l{i}_{part}": size for i in range(2) for part, size in HARMLESS.items()}
    ops |= {"logits": 30.0} | sizes
    return RangeReport("ab12", 1, tuple(OpRange(op, size, 0.0) for op, size in ops.items()))


def chosen(name: str = FP16, **sizes: float) -> RepairSettings:
    return settings_of(needed_repairs(report(**sizes), load_recipe(name)))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, RepairSettings()),
        ({"l0_residual": 32_000}, RepairSettings()),
        ({"l0_residual": 33_000}, RepairSettings(residual_shift=1)),
        ({"l1_down": 65_600}, RepairSettings(residual_shift=2)),
        ({"l0_o": 40_000, "l1_attn_residual": 1e6}, RepairSettings(residual_shift=5)),
        ({"l1_residual": 1e9}, RepairSettings(residual_shift=8)),
        ({"l1_attn_scores": 40_000}, RepairSettings(float32_scores=(1,))),
        ({"l1_k_rotated": 40_000}, RepairSettings(rescaled_keys=(1,))),
        ({"l0_q_rotated": 40_000}, RepairSettings(rescaled_keys=(0,))),
        ({"l1_k_rotated": 300, "l1_attn_scores": 5000}, RepairSettings(separate_key_bias=(1,))),
        ({"l1_k_rotated": 300, "l1_attn_scores": 3000}, RepairSettings()),
        ({"l1_k_rotated": 60, "l1_attn_scores": 5000}, RepairSettings()),
        # Without its bias the key needs no rescaling.
        (
            {"l1_k_rotated": 40_000, "l1_attn_scores": 40_000},
            RepairSettings(float32_scores=(1,), separate_key_bias=(1,)),
        ),
    ],
)
def test_rules(sizes, expected):
    assert chosen(**sizes) == expected
    if sizes.get("l1_residual") != 1e9:
        assert not at_risk(report(**sizes), replace(recipe(FP16), repairs=expected))


def test_reasons_name_the_worst_operation():
    (repair,) = needed_repairs(report(l0_residual=40_000, l1_residual=100_000), recipe(FP16))
    assert (repair.setting, repair.value) == ("residual_shift", 2)
    assert repair.reason == "l1_residual reaches 100000, 0.7x headroom"


def test_in_float32_only_the_cache_counts():
    """It is float16 in Core ML whatever the arithmetic."""
    sizes = {"l0_residual": 1e5, "l1_attn_scores": 1e5, "l1_k_rotated": 1e5}
    assert chosen(FP32, **sizes, l1_k_unbiased=9e4) == RepairSettings(rescaled_keys=(1,))
    assert chosen(FP32, **sizes) == RepairSettings(separate_key_bias=(1,))
    in_tensors = recipe(FP32, coreml={"kv_cache": "tensors"})
    assert not needed_repairs(report(**sizes, l1_k_unbiased=9e4), in_tensors)
    assert not needed_repairs(report(**sizes), in_tensors)


def test_operations_kept_in_float32_need_no_repair():
    kept = recipe(FP16, decoder={"float32_ops": ("l*_residual", "l1_attn")})
    assert not needed_repairs(report(l0_residual=1e5, l1_attn_scores=1e5), kept)
    assert needed_repairs(report(l0_residual=1e5, l0_attn_scores=1e5), kept)


def test_what_no_repair_helps_stays_at_risk():
    found = report(l0_gated=50_000, l1_v_heads=60_000, stem_0=70_000, logits=40_000)
    assert not needed_repairs(found, recipe(FP16))
    assert [o.op for o in at_risk(found, recipe(FP16))] == ["l1_v_heads", "l0_gated", "logits"]
    half_vision = recipe(FP16, vision={"compute": "float16"})
    assert at_risk(found, half_vision)[0].op == "stem_0"
    kept = recipe(FP16, decoder={"float32_ops": ("lm_head", "l0_gated")})
    assert [o.op for o in at_risk(found, kept)] == ["l1_v_heads"]


def test_missing_repairs_are_those_a_recipe_lacks():
    found = report(l0_residual=1e5, l1_attn_scores=1e5, l1_k_rotated=1000)
    assert [r.setting for r in missing_repairs(found, recipe(FP16))] == [
        "residual_shift", "float32_scores", "separate_key_bias",
    ]  # fmt: skip
    more = RepairSettings(residual_shift=3, separate_key_bias=(0, 1))  # its scores are float32 too
    assert not missing_repairs(found, replace(recipe(FP16), repairs=more))
    less = RepairSettings(residual_shift=1, float32_scores=(1,), separate_key_bias=(0,))
    lacking = missing_repairs(found, replace(recipe(FP16), repairs=less))
    assert [r.setting for r in lacking] == ["residual_shift", "separate_key_bias"]


@pytest.mark.parametrize("name", ["fp16", "int4"])
def test_a_repaired_recipe_is_complete(name):
    base = load_recipe(name)
    repairs = needed_repairs(report(l0_residual=1e5, l1_attn_scores=1e5), base)
    made = repaired_recipe(base, "mine", repairs)
    text = recipe_text(made, repairs)
    assert from_plain(Recipe, yaml.safe_load(text)) == made
    assert text.startswith("# repairs.residual_shift: l0_residual reaches 100000, 0.7x headroom\n")
    changed = {"name": base.name, "description": base.description, "repairs": base.repairs}
    assert replace(made, **changed) == base
    assert made.name == "mine"
    assert made.repairs == RepairSettings(2, (), (1,), ())
