import numpy as np
import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.quantization.prepared_weights import prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.weight import QuantizedWeight
from fastvlm_convert.recipe import load_recipe, without_data
from fastvlm_convert.recipe_settings import RepairSettings
from fastvlm_convert.weights.fold import fold, scaled_rows
from fastvlm_convert.weights.rescale import fp16_safe, key_exponents, repaired_config
from fastvlm_convert.weights.source import Weight
from tests.bundles import recipe
from tests.checkpoints import SETS, golden_checkpoint, golden_model
from tests.planted import DEMO, copy_demo, demo_tensors, plant_key_bias

SHIFTED = RepairSettings(residual_shift=5)
RESCALED = RepairSettings(rescaled_keys=(0, 1))


def unbalanced(checkpoint) -> dict[str, Weight]:
    """Folded weights whose keys are between 100 times smaller and 50 times larger than they were."""
    weights, decoder = fold(checkpoint.weights), checkpoint.config.decoder
    factors = np.tile(np.geomspace(0.01, 50, decoder.head_dim // 2), 2 * decoder.num_kv_heads)
    for layer in range(decoder.num_layers):
        for part in ("weight", "bias"):
            name = f"decoder.layers.{layer}.self_attn.k_proj.{part}"
            weights[name] = scaled_rows(weights[name], lambda: factors)
    return weights


def logits(model, tokens: int = 20) -> torch.Tensor:
    ids = torch.arange(tokens)[None] % 64
    cache = model.decoder.new_cache(64)
    first = model.decoder(model.decoder.embed_tokens(ids), cache)
    return torch.cat([first, model.decoder(model.decoder.embed_tokens(ids[:, :1]), cache)], 1)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("repairs", [SHIFTED, RESCALED], ids=["shifted", "rescaled"])
def test_repaired_weights_give_the_same_bits(name, repairs):
    """Powers of two are exact: every rounding of the reference's float32 happens to the same digits."""
    checkpoint = golden_checkpoint(name)
    weights = unbalanced(checkpoint)
    safe = fp16_safe(weights, checkpoint.config.decoder, repairs)
    plain = load_model(checkpoint.config, weights, folded=True)
    repaired = load_model(repaired_config(checkpoint.config, repairs), safe, folded=True)
    assert torch.equal(logits(plain), logits(repaired))
    changed = "o_proj" if repairs is SHIFTED else "k_proj"
    name = f"decoder.layers.1.self_attn.{changed}.weight"
    assert np.abs(np.log2(weights[name].array() / safe[name].array())).max() >= 3


def test_the_stream_is_divided_and_the_norms_know():
    checkpoint, plain = golden_checkpoint(SETS[0]), golden_model(SETS[0], folded=True)
    weights = fp16_safe(fold(checkpoint.weights), checkpoint.config.decoder, SHIFTED)
    shifted = load_model(repaired_config(checkpoint.config, SHIFTED), weights, folded=True)
    streams = []
    for model in (plain, shifted):
        layer = model.decoder.layers[1]
        handle = layer.register_forward_hook(lambda _m, _i, y: streams.append(y))
        logits(model)
        handle.remove()
    assert torch.equal(streams[0], streams[2] * 32)
    assert torch.equal(streams[1], streams[3] * 32)
    assert shifted.decoder.norm.eps == plain.decoder.norm.eps / 32**2


def test_only_what_is_named_changes():
    checkpoint = golden_checkpoint(SETS[0])
    before = fold(checkpoint.weights)
    for repairs, changed in (
        (RepairSettings(), ()),
        (SHIFTED, (".o_proj.weight", ".down_proj.weight")),
        (RepairSettings(rescaled_keys=(1,)), ("layers.1.self_attn.q_proj.", "layers.1.self_attn.k_proj.")),
        (RepairSettings(float32_scores=(0,), separate_key_bias=(1,)), ()),
    ):
        after = fp16_safe(before, checkpoint.config.decoder, repairs)
        found = {name for name in before if after[name] is not before[name]}
        assert found == {name for name in before if any(part in name for part in changed)}
        for name in found:
            whole = after[name].array()
            assert whole.dtype == np.float32
            assert np.array_equal(after[name].read(3, 7), whole[3:7])


def test_keys_and_queries_meet_in_the_middle(tmp_path):
    checkpoint = open_checkpoint(copy_demo(tmp_path, plant_key_bias(demo_tensors(), key=4096, query=1)))
    decoder = checkpoint.config.decoder
    found = key_exponents(fold(checkpoint.weights), decoder, "decoder.layers.2")
    assert found.shape == (4, 16)
    # The planted pair: queries of 1 to 3 from bias and weights, keys of 4096.
    assert set(found[:, 15]) <= {5, 6}
    assert np.abs(found[:, :15]).max() <= 2
    repaired = fp16_safe(fold(checkpoint.weights), decoder, RepairSettings(rescaled_keys=(2,)))
    after = key_exponents(repaired, decoder, "decoder.layers.2")
    assert not after.any()  # nothing is left to exchange


def test_a_head_that_is_all_zero_is_left_alone():
    checkpoint = golden_checkpoint(SETS[0])
    weights = fold(checkpoint.weights)
    for part in ("weight", "bias"):
        name = f"decoder.layers.0.self_attn.k_proj.{part}"
        zeros = np.zeros(weights[name].shape, np.float32)
        weights[name] = Weight(zeros.shape, "float32", lambda a, b, z=zeros: z[a:b])
    assert not key_exponents(weights, checkpoint.config.decoder, "decoder.layers.0").any()


@pytest.mark.parametrize("setting", ["rescaled_keys", "float32_scores", "separate_key_bias"])
@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there(setting, layer):
    repairs = RepairSettings(**{setting: (0, layer)})
    with pytest.raises(RecipeError, match=rf"repairs\.{setting} names layer {layer}.*are 0 to 1"):
        repaired_config(golden_checkpoint(SETS[0]).config, repairs)


@pytest.mark.parametrize("shift", [-1, 9])
def test_a_shift_out_of_range(shift):
    with pytest.raises(RecipeError, match=f"residual_shift is {shift}, expected 0 to 8"):
        RepairSettings(residual_shift=shift)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_integers_do_not_change(name, tmp_path):
    """Scaling whole rows shifts their scales and nothing else, as long as those stay normal numbers."""
    checkpoint = open_checkpoint(copy_demo(tmp_path, plant_key_bias(demo_tensors(), key=64, query=4)))
    plain = prepare_weights(plan_weights(checkpoint, without_data(load_recipe(name)))).weights
    repairs = {"residual_shift": 1, "rescaled_keys": (0, 1, 2, 3)}
    settings = without_data(recipe(name, repairs=repairs))
    repaired = prepare_weights(plan_weights(checkpoint, settings)).weights
    moved = 0
    for key, weight in plain.items():
        if not key.startswith("decoder.layers.2.") or not isinstance(weight, QuantizedWeight):
            continue
        before, after = (w.read(0, w.rows) for w in (weight, repaired[key]))
        normal = np.minimum(np.abs(before.scale), np.abs(after.scale)) >= np.finfo(np.float16).tiny
        assert normal.mean() > 0.99
        q = [m.q.reshape(*m.scale.shape, -1)[normal] for m in (before, after)]
        assert np.array_equal(*q), key
        assert np.array_equal(before.zero_point[normal], after.zero_point[normal]), key
        exponents = np.log2(after.scale[normal].astype(np.float64) / before.scale[normal])
        assert np.array_equal(exponents, np.rint(exponents)), key
        moved += bool(exponents.any())
    assert moved == 4  # q, k, o and down


def test_scales_below_the_normal_numbers_cost_little():
    """Float16 has fewer digits there; the search judges the scales as they are stored."""
    checkpoint = open_checkpoint(DEMO)
    name = "decoder.layers.0.mlp.down_proj.weight"
    exact = fold(checkpoint.weights)[name].array()
    errors = []
    for shift in (0, 8):
        settings = recipe("int8", repairs={"residual_shift": shift})
        weight = prepare_weights(plan_weights(checkpoint, settings)).weights[name]
        assert isinstance(weight, QuantizedWeight)
        errors.append(sqnr_db(exact, weight.dense().array() * np.float32(2**shift)))
    assert errors[0] - errors[1] < 3
