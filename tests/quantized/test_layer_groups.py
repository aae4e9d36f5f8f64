from pathlib import Path

import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantized.layer_groups import group_layers, scheme_name
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.published import published_config

CONFIG = published_config("0.5b")


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: weight.shape for name, weight in placeholder_weights(CONFIG, ()).items()}


def test_every_layer_is_in_one_group():
    plans = plan_layers(shapes(), load_recipe("int4"))
    groups = group_layers(plans)
    assert sorted(p.layer for g in groups for p in g.plans) == sorted(p.layer for p in plans)
    assert [(g.component, g.kind, len(g.plans)) for g in groups] == [
        ("vision", "other convolutions", 1),  # the stem's first, from three colours
        ("vision", "depthwise convolutions", 90),
        ("vision", "1x1 convolutions", 95),
        ("vision", "attention qkv/proj", 12),
        ("projector", "linears fc1/fc2", 2),
        ("decoder", "attention q/k/v/o", 96),
        ("decoder", "mlp gate/up/down", 72),
        ("embedding", "table", 1),
    ]


def test_figures_of_a_group_are_sums():
    groups = {(g.component, g.kind): g for g in group_layers(plan_layers(shapes(), load_recipe("int4")))}
    mlp = groups["decoder", "mlp gate/up/down"]
    assert mlp.num_weights == 24 * 3 * 896 * 4864
    # Four bits; for 64 weights sixteen of a scale and four of a zero point.
    assert mlp.stored_bits == mlp.num_weights * (4 + (16 + 4) / 64)
    assert (mlp.scheme, mlp.solver, mlp.reason) == (AffineScheme(4, 64, False), "gptq", None)


def test_layers_of_different_fates_are_different_groups():
    layers = {f"projector.fc{i}.weight": (8, width) for i, width in ((1, 128), (2, 96), (3, 80))}
    recipe = load_recipe("int4")
    rule = recipe.quantize[0]
    named = {"decoder.embed_tokens.weight": (8, 100), "decoder.lm_head.weight": (8, 128)}
    groups = group_layers(plan_layers(layers | named | {"decoder.x.weight": (8, 64)}, recipe))
    assert rule.block_size == 128
    embedding = next(g for g in groups if g.component == "embedding")
    assert (embedding.scheme, embedding.solver) == (None, None)
    assert "its width 100 is no multiple of block_size 16" in embedding.reason
    assert next(g for g in groups if g.component == "head").scheme == AffineScheme(8, 128, True)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (AffineScheme(4, 32, True), "int4/32"),
        (AffineScheme(8, None, False), "int8"),
        (PaletteScheme(4, 16, False), "palette4/16"),
        (PaletteScheme(6, 8, True), "palette6/8"),
        (None, None),
    ],
)
def test_schemes_in_a_word(scheme, name):
    assert scheme_name(scheme) == name


def test_published_dimensions_are_those_of_a_checkpoint():
    """The demo has the same names, so the same layers at other widths."""
    demo = fold(open_checkpoint(Path(__file__).parents[2] / "checkpoints" / "fastvlm-demo").weights)
    assert {n for n in demo if ".layers." not in n and "blocks" not in n} == {
        n for n in shapes() if ".layers." not in n and "blocks" not in n
    }
