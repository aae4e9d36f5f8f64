"""What a plan says of a layer is what is stored of it, for any rules."""

import dataclasses
import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.layer_report import LayerReport, component_reports, layer_reports
from fastvlm_convert.quantized.schemes import AffineMatrix
from fastvlm_convert.quantized.sqnr import ErrorMeter
from fastvlm_convert.quantized.weight import StoredWeight
from fastvlm_convert.recipe_settings import BLOCK_SIZES, QuantizeRule
from fastvlm_convert.weights.source import Weight, computed
from tests.bundles import recipe
from tests.quantization.layers import weights

SHAPES = {
    "vision.stem.0.weight": (16, 3, 3, 3),
    "vision.stages.0.0.fc1.weight": (48, 32, 1, 1),
    "projector.fc1.weight": (24, 64),
    "decoder.embed_tokens.weight": (40, 128),
    "decoder.layers.0.mlp.up_proj.weight": (32, 96),
    "decoder.layers.0.mlp.down_proj.weight": (64, 80),
}


def floats(seed: int, shape: tuple[int, ...]) -> Weight:
    matrix = weights(seed, shape[0], math.prod(shape[1:]))
    return computed(shape, "float32", lambda: matrix.reshape(shape))


FLOATS = {name: floats(seed, shape) for seed, (name, shape) in enumerate(SHAPES.items())}

_ways = st.sampled_from(["smaller", "float"])
_integers = st.builds(
    QuantizeRule,
    st.just(("*",)),
    st.sampled_from(["int4", "int8"]),
    block_size=st.sampled_from(["channel", *BLOCK_SIZES]),
    symmetric=st.booleans(),
    on_indivisible=_ways,
)
_palettes = st.builds(
    QuantizeRule,
    st.just(("*",)),
    st.sampled_from(["palette4", "palette6", "palette8"]),
    group_size=st.sampled_from([1, 3, 8, 16, 32]),
    channel_scale=st.booleans(),
    on_indivisible=_ways,
)
_rules = st.one_of(_integers, _palettes, st.just(QuantizeRule(("*",), "float")))


def bits_of(weight: StoredWeight) -> int:
    """What the parts of a weight take, counted on the parts themselves."""
    total = 0
    for matrix in weight.chunks():
        if isinstance(matrix, AffineMatrix):
            total += matrix.q.size * weight.scheme.bits + 16 * matrix.scale.size
            total += 0 if weight.scheme.symmetric else matrix.zero_point.size * weight.scheme.bits
        else:
            total += matrix.indices.size * weight.scheme.bits + 16 * matrix.palette.size
            total += 0 if matrix.scale is None else 16 * matrix.scale.size
    return total


@given(st.lists(_rules, min_size=len(SHAPES), max_size=len(SHAPES)))
def test_the_report_is_the_plan_and_the_bits_are_those_stored(rules):
    named = [
        replace(rule, layers=(name.removesuffix(".weight"),))
        for rule, name in zip(rules, SHAPES, strict=True)
    ]
    plans = plan_layers(SHAPES, replace(recipe(), quantize=tuple(named)))
    meter = ErrorMeter(FLOATS)
    stored = meter.view(quantize_weights(FLOATS, plans))
    bits = {name: bits_of(weight) for name, weight in stored.items() if isinstance(weight, StoredWeight)}
    reports = layer_reports(plans, meter.sums)
    assert tuple(report.plan for report in reports) == plans
    for report in reports:
        assert (f"{report.layer}.weight" in bits) == (report.quantized is not None)
        assert report.stored_bits == bits.get(f"{report.layer}.weight", 32 * report.size)
        assert from_plain(LayerReport, dataclasses.asdict(report)) == report
    total = component_reports(reports)[-1]
    assert total.num_weights == sum(math.prod(shape) for shape in SHAPES.values())
    assert total.stored_bytes == -(-sum(plan.stored_bits for plan in plans) // 8)
