import dataclasses
import math

import pytest

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.layer_report import LayerReport, component_reports, layer_reports, scheme_text
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme
from fastvlm_convert.quantized.sqnr import SquaredSums

NARROW = "its width 16 is no multiple of block_size 32, so 16"
PLANS = [
    LayerPlan("vision.stem.0", (8, 3, 3, 3), AffineScheme(8, None, True), "search", None, 8 * (27 * 8 + 16)),
    LayerPlan("projector.fc1", (4, 32), None, "search", "rule '*.fc1'", 4 * 32 * 16),
    LayerPlan("decoder.layers.0.mlp.up_proj", (4, 64), AffineScheme(4, 32, False), "gptq", None, 4 * 296),
    LayerPlan("decoder.layers.0.mlp.gate_proj", (8, 64), PaletteScheme(6, 4, True), "weighted", None, 5248),
    LayerPlan("decoder.embed_tokens", (10, 64), AffineScheme(8, 16, True), "search", NARROW, 10 * 64 * 9),
    LayerPlan("decoder.lm_head", (10, 64), None, "search", None, 10 * 64 * 16),
]
SUMS = {"vision.stem.0": (10.0, 0.01), "decoder.layers.0.mlp.up_proj": (4.0, 0.04),
        "decoder.layers.0.mlp.gate_proj": (6.0, 0.01), "decoder.embed_tokens": (1.0, 0.0)}  # fmt: skip


@pytest.fixture(scope="module")
def layers():
    return layer_reports(PLANS, lambda name: SquaredSums(*SUMS[name.removesuffix(".weight")]))


def test_a_report_says_what_the_plan_said(layers):
    assert [report.plan for report in layers] == PLANS
    assert [report.scheme for report in layers] == ["int8", "float", "int4", "palette6", "int8", "float"]
    assert [report.sqnr_db for report in layers] == [30.0, None, 20.0, 27.78, None, None]
    assert [report.squared_sum for report in layers] == [10.0, None, 4.0, 6.0, 1.0, None]


def test_it_survives_plain_data(layers):
    assert tuple(from_plain(LayerReport, dataclasses.asdict(report)) for report in layers) == layers


def test_components(layers):
    vision, projector, decoder, head, embedding, total = component_reports(layers)
    names = ["vision", "projector", "decoder", "head", "embedding", "total"]
    assert [c.name for c in (vision, projector, decoder, head, embedding, total)] == names
    assert decoder.num_weights == 768
    assert decoder.stored_bytes == (4 * 296 + 5248) / 8
    assert decoder.bits_per_weight == (4 * 296 + 5248) / 768
    assert decoder.schemes == {"int4 block 32, asymmetric": 1, "palette6 group 4, channel scale": 1}
    assert decoder.sqnr_db == pytest.approx(10 * math.log10(10 / 0.05), abs=0.01)
    assert (projector.sqnr_db, projector.in_float) == (None, {"projector.fc1": "rule '*.fc1'"})
    assert (head.in_float, embedding.sqnr_db) == ({"decoder.lm_head": None}, None)
    assert (embedding.fitted, decoder.fitted) == ({"decoder.embed_tokens": NARROW}, {})
    assert total.fitted == embedding.fitted
    assert total.num_layers == 6
    assert total.stored_bytes == sum(plan.stored_bits for plan in PLANS) / 8
    assert total.sqnr_db == pytest.approx(10 * math.log10(21 / 0.06), abs=0.01)


def test_schemes_in_a_few_words():
    assert scheme_text(AffineScheme(4, 32, True)) == "int4 block 32"
    assert scheme_text(AffineScheme(8, None, False)) == "int8 channel, asymmetric"
    assert scheme_text(PaletteScheme(4, 16, False)) == "palette4 group 16"
    assert scheme_text(None) == "float"
