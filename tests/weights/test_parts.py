"""Parts and groups of layers against the names of a whole model, and against the norms it has."""

from collections import Counter

import pytest

from fastvlm_convert.weights.fold import folded_shapes
from fastvlm_convert.weights.parts import PARTS, by_shared_input, input_group_of, is_language, part_of
from fastvlm_convert.weights.published import published_config
from fastvlm_convert.weights.shapes import weight_shapes

NAMES = list(folded_shapes(weight_shapes(published_config("7b", num_layers=2))))
BLOCK = "decoder.layers.3"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vision.stem.0.weight", "vision"),
        ("vision.final.se.reduce", "vision"),
        ("projector.fc1.bias", "projector"),
        ("decoder.layers.0.mlp.up_proj", "decoder"),
        ("decoder.norm.weight", "decoder"),
        ("decoder.lm_head", "head"),
        ("decoder.lm_head.weight", "head"),
        ("decoder.embed_tokens", "embedding"),
        ("decoder.embed_tokens.weight", "embedding"),
    ],
)
def test_layers_and_their_tensors_belong_to_one_part(name, part):
    assert part_of(name) == part
    assert is_language(name) == (part in ("decoder", "head", "embedding"))


def test_a_model_has_every_part():
    assert set(map(part_of, NAMES)) == set(PARTS)


@pytest.mark.parametrize("name", ["lm_head.weight", "visions.stem", "model.layers.0.mlp.up_proj", ""])
def test_a_name_that_is_not_canonical_belongs_to_none(name):
    with pytest.raises(ValueError, match="no part"):
        part_of(name)


def test_the_groups_of_a_decoder_layer_and_of_an_encoder_block():
    q, k, v = (f"{BLOCK}.self_attn.{p}_proj" for p in "qkv")
    for layer in (q, k, v):
        group = input_group_of(layer)
        assert (group.layers, group.norm) == ((q, k, v), f"{BLOCK}.input_layernorm")
        assert group.is_stacked
    gate = input_group_of(f"{BLOCK}.mlp.gate_proj")
    assert gate.layers == (f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj")
    assert (gate.norm, gate.is_stacked) == (f"{BLOCK}.post_attention_layernorm", False)
    block = "vision.stages.3.blocks.0"
    assert input_group_of(f"{block}.attention.qkv").norm == f"{block}.norm"
    for layer in (f"{BLOCK}.self_attn.o_proj", f"{block}.attention.proj", "projector.fc1", "decoder.lm_head"):
        assert input_group_of(layer) is None


def test_every_norm_of_a_block_makes_the_input_of_one_group():
    """The names in the groups are those of the model: nothing is misspelled, no norm is left out."""
    layers = [name.removesuffix(".weight") for name in NAMES if name.endswith(".weight")]
    groups = {group for layer in layers if (group := input_group_of(layer))}
    assert {layer for group in groups for layer in group.layers} <= set(layers)
    norms = {layer for layer in layers if layer.endswith("norm")} - {"decoder.norm"}
    assert Counter(group.norm for group in groups) == Counter(norms)


def test_layers_are_grouped_in_the_order_in_which_they_come():
    q, k, v = (f"{BLOCK}.self_attn.{p}_proj" for p in "qkv")
    others = [f"{BLOCK}.self_attn.o_proj", f"{BLOCK}.mlp.up_proj", "decoder.layers.4.mlp.up_proj"]
    assert by_shared_input([k, *others, v]) == [(k, v), *((layer,) for layer in others)]
    assert by_shared_input([q, k, v]) == [(q, k, v)]
