import json
import math

import numpy as np
import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe
from tests.adapters import PREFIX, low_rank, write_adapter
from tests.checkpoints import HF, LLAVA, edit_tensors, golden_checkpoint, read_tensors, tree_state

QUERY = "model.layers.0.self_attn.q_proj"
KEY = "model.layers.1.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"
EMBED = "model.embed_tokens"
CONV = "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv"
PLAIN = low_rank(QUERY, 64, 64, 4)


def base(name, checkpoint=LLAVA):
    return torch.from_numpy(golden_checkpoint(checkpoint).weights[name].array())


def assert_only_changed(opened, changed, checkpoint=LLAVA):
    """`opened` has the values of `changed` and is otherwise the golden checkpoint."""
    for name, weight in golden_checkpoint(checkpoint).weights.items():
        found = opened.weights[name].array()
        if name in changed:
            torch.testing.assert_close(torch.from_numpy(found), changed[name], rtol=1e-6, atol=1e-5)
            assert not np.allclose(found, weight.array())
        else:
            np.testing.assert_array_equal(found, weight.array(), err_msg=name)


@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_merging_adds_scaled_products(rslora, as_bin, llava, tmp_path):
    tensors = low_rank(QUERY, 64, 64, 4) | low_rank(DOWN, 64, 176, 9, seed=1)
    adapter = write_adapter(tmp_path / "adapter", tensors, as_bin, lora_alpha=16, use_rslora=rslora)
    opened = open_checkpoint(llava, adapter)
    expected = {}
    for module, rank in ((QUERY, 4), (DOWN, 9)):
        scale = 16 / (math.sqrt(rank) if rslora else rank)
        a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        name = f"decoder.{module.removeprefix('model.')}.weight"
        expected[name] = base(name) + scale * b @ a
    assert_only_changed(opened, expected)
    weight = opened.weights["decoder.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(weight.read(10, 20), weight.array()[10:20])


def test_both_folders_stay_as_they_were_and_count_for_the_hash(llava, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", low_rank(QUERY, 64, 64, 4))
    before = tree_state(tmp_path)
    with_adapter, without = open_checkpoint(llava, adapter), open_checkpoint(llava)
    for weight in with_adapter.weights.values():
        weight.array()
    assert tree_state(tmp_path) == before
    assert set(with_adapter.files) - set(without.files) == set(adapter.iterdir())
    assert content_hash(with_adapter.files) != content_hash(without.files)


def test_the_alpha_of_a_module_is_found_by_patterns_as_in_peft(llava, tmp_path):
    modules = {QUERY: 64, KEY: 32, "model.layers.0.mlp.up_proj": 176, "model.layers.1.mlp.up_proj": 176}
    tensors = {}
    for i, (module, out) in enumerate(modules.items()):
        tensors |= low_rank(module, out, 64, 4, seed=i)
    patterns = {"proj": 99, "layers.[01].*q_proj": 2, "k_proj": 4, "model.layers.0.mlp.up_proj": 6}
    adapter = write_adapter(tmp_path / "adapter", tensors, lora_alpha=20, alpha_pattern=patterns)
    alphas = dict(zip(modules, (2, 4, 6, 20), strict=True))  # "proj" is the end of no module's last name
    expected = {}
    for module, alpha in alphas.items():
        a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        name = f"decoder.{module.removeprefix('model.')}.weight"
        expected[name] = base(name) + alpha / 4 * b @ a
    assert_only_changed(open_checkpoint(llava, adapter), expected)


def test_an_adapter_of_the_embedding_is_stored_the_other_way_round(llava, tmp_path):
    rng = torch.Generator().manual_seed(5)
    a, b = torch.randn(3, 512, generator=rng), torch.randn(64, 3, generator=rng)
    tensors = {f"{PREFIX}{EMBED}.lora_embedding_A": a, f"{PREFIX}{EMBED}.lora_embedding_B": b}
    opened = open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors, lora_alpha=6))
    name = "decoder.embed_tokens.weight"
    assert_only_changed(opened, {name: base(name) + 2 * (b @ a).T})
    np.testing.assert_array_equal(opened.weights[name].read(7, 300), opened.weights[name].array()[7:300])


def test_tensors_that_were_trained_whole_replace_theirs(llava, tmp_path):
    rng = torch.Generator().manual_seed(6)
    norm, bias = torch.randn(64, generator=rng), torch.randn(64, generator=rng)
    projector = torch.randn(64, 256, generator=rng).half()
    adapter = write_adapter(
        tmp_path / "adapter",
        low_rank(QUERY, 64, 64, 4)
        | {f"{PREFIX}model.norm.weight": norm, f"{PREFIX}{QUERY}.base_layer.bias": bias},
        whole={f"{PREFIX}model.mm_projector.0.weight": projector},
    )
    opened = open_checkpoint(llava, adapter)
    query = "decoder.layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(opened.weights["decoder.norm.weight"].array(), norm.numpy())
    np.testing.assert_array_equal(opened.weights[f"{query}.bias"].array(), bias.numpy())
    np.testing.assert_array_equal(opened.weights["projector.fc1.weight"].array(), projector.float().numpy())
    assert opened.weights["projector.fc1.weight"].dtype == "float16"
    assert not np.allclose(opened.weights[f"{query}.weight"].array(), base(f"{query}.weight"))


def test_a_tensor_can_be_replaced_and_adapted(llava, tmp_path):
    table = torch.ones(512, 64)
    a, b = torch.ones(1, 512), torch.ones(64, 1)
    tensors = {
        f"{PREFIX}{EMBED}.base_layer.weight": table,
        f"{PREFIX}{EMBED}.lora_embedding_A": a,
        f"{PREFIX}{EMBED}.lora_embedding_B": b,
    }
    opened = open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors, lora_alpha=2))
    assert (opened.weights["decoder.embed_tokens.weight"].array() == 3).all()


def test_transformers_names_and_convolutions_of_1x1(hf, tmp_path):
    query, conv = (
        "model.language_model.layers.0.self_attn.q_proj",
        "model.vision_tower.timm_model.stem.2.reparam_conv",
    )
    tensors = low_rank(query, 64, 64, 4) | low_rank(conv, 8, 8, 2, seed=1)
    opened = open_checkpoint(hf, write_adapter(tmp_path / "adapter", tensors))
    expected = {}
    for module, name in ((query, "decoder.layers.0.self_attn.q_proj.weight"), (conv, "vision.stem.2.weight")):
        a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        weight = base(name, HF)
        expected[name] = weight + (8 / len(a) * b @ a).reshape(weight.shape)
    assert_only_changed(opened, expected, HF)


@pytest.mark.parametrize("start", ["orthogonal", "eva", "gaussian", "mica", False, True])
def test_other_starts_leave_the_base_as_it_was(start, llava, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", PLAIN, init_lora_weights=start, fan_in_fan_out=True)
    plain = write_adapter(tmp_path / "plain", PLAIN)
    name = "decoder.layers.0.self_attn.q_proj.weight"
    found, expected = (open_checkpoint(llava, folder).weights[name].array() for folder in (adapter, plain))
    np.testing.assert_array_equal(found, expected)


def test_a_convolution_of_any_kernel_is_adapted_as_in_peft(llava, tmp_path):
    """PEFT convolves the halves: delta[o, i, y, x] = sum over r of B[o, r] A[r, i, y, x]."""
    rng = torch.Generator().manual_seed(3)
    a, b = torch.randn(5, 3, 3, 3, generator=rng), torch.randn(8, 5, 1, 1, generator=rng)
    tensors = {f"{PREFIX}{CONV}.lora_A.weight": a, f"{PREFIX}{CONV}.lora_B.weight": b}
    opened = open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors, lora_alpha=10))
    delta = 2 * torch.nn.functional.conv2d(a.transpose(0, 1), b).transpose(0, 1)
    assert_only_changed(opened, {"vision.stem.0.weight": base("vision.stem.0.weight") + delta})


def test_adapters_of_the_encoder_reach_their_stage_in_apples_layout(llava, tmp_path):
    """Its names number blocks through all stages; what lies between is not in the adapter."""
    module = "model.vision_tower.vision_tower.model.network.10.0.convffn.fc1"
    rng = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 128, 1, 1, generator=rng), torch.randn(512, 2, 1, 1, generator=rng)
    tensors = {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    opened = open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors, lora_alpha=2))
    name = "vision.stages.4.blocks.0.ffn.fc1.weight"
    assert_only_changed(opened, {name: base(name) + (b[:, :, 0, 0] @ a[:, :, 0, 0])[..., None, None]})


def test_the_whole_tower_of_llavas_training_replaces_the_checkpoints(llava, tmp_path):
    """Also what no part of the model reads: counters, and the head of the classifier."""
    tower = {n: t for n, t in read_tensors(llava).items() if "vision_tower" in n}
    assert any("num_batches_tracked" in n for n in tower)
    assert any("head.proj" in n for n in tower)
    tower = {n: 2 * t if t.is_floating_point() else t + 1 for n, t in tower.items()}
    whole = {f"{PREFIX}{n}": t for n, t in tower.items()}
    opened = open_checkpoint(llava, write_adapter(tmp_path / "adapter", PLAIN, whole=whole))
    for name, weight in golden_checkpoint(LLAVA).weights.items():
        factor = 2 if name.startswith("vision.") else 1
        if name != "decoder.layers.0.self_attn.q_proj.weight":
            np.testing.assert_array_equal(opened.weights[name].array(), factor * weight.array())


def test_only_files_that_are_read_count(llava, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", PLAIN)
    before = open_checkpoint(llava, adapter).sha256
    (adapter / "optimizer.pt").write_bytes(b"large")
    assert open_checkpoint(llava, adapter).sha256 == before


TRAINED = {"model_type": "llava_qwen2", "mm_projector_lr": 2e-5, "freeze_mm_mlp_adapter": False}


@pytest.mark.parametrize(
    ("changes", "whole", "warned"),
    [
        ({}, None, True),
        ({"mm_projector_lr": None, "unfreeze_mm_vision_tower": True}, None, True),
        ({"mm_projector_lr": None}, None, False),
        ({"freeze_mm_mlp_adapter": True}, None, False),
        ({"model_type": "fast_vlm"}, None, False),
        ({}, {f"{PREFIX}model.mm_projector.0.bias": torch.ones(64)}, False),
    ],
)
def test_a_projector_that_was_trained_and_is_not_there_is_said(changes, whole, warned, llava, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", PLAIN, whole=whole)
    (adapter / "config.json").write_text(json.dumps(TRAINED | changes))
    notes = open_checkpoint(llava, adapter).notes
    assert any(r"is non_lora_trainables.bin missing?" in note for note in notes) == warned


def test_an_adapters_tokenizer_is_said(llava, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", PLAIN)
    assert open_checkpoint(llava, adapter).notes == ()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"):
        (adapter / name).write_bytes((llava / name).read_bytes())
    opened = open_checkpoint(llava, adapter)
    assert opened.notes == ("the tokenizer is the adapter's own",)
    assert {path.parent for path in opened.tokenizer.files} == {adapter}
    assert set(opened.tokenizer.files) <= set(opened.settings)


def test_a_table_that_both_uses_share_stays_one_when_llavas_training_replaced_it(llava, tmp_path):
    table = torch.randn(512, 64)
    whole = {f"{PREFIX}{EMBED}.weight": table}
    adapter = write_adapter(tmp_path / "adapter", PLAIN, whole=whole)
    edit_tensors(llava, {"lm_head.weight": base("decoder.embed_tokens.weight")})
    opened = open_checkpoint(llava, adapter)
    assert opened.config.decoder.tied
    np.testing.assert_array_equal(opened.weights["decoder.embed_tokens.weight"].array(), table.numpy())


def test_what_merging_makes_infinite_is_named(llava, tmp_path):
    tensors = {k: torch.full_like(t, 1e30) for k, t in PLAIN.items()}
    opened = open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors))
    name = "decoder.layers.0.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match=r"holds 4096 values that .* after merging the adapter"):
        opened.weights[name].array()


def test_patterns_that_would_take_for_ever_do_not(llava, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", PLAIN, alpha_pattern={"(([a-z_0-9]+\\.?)+)+!": 1})
    assert open_checkpoint(llava, adapter).config.decoder.num_layers == 2


def test_an_adapter_that_is_no_number_is_named(llava, tmp_path):
    tensors = low_rank(QUERY, 64, 64, 4)
    tensors[f"{PREFIX}{QUERY}.lora_B.weight"][1, 1] = float("inf")
    opened = open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors))
    with pytest.raises(
        CheckpointError, match=r"q_proj\.lora_B\.weight' holds 1 values that are NaN or infinite"
    ):
        opened.weights["decoder.layers.0.self_attn.q_proj.weight"].array()


@pytest.mark.parametrize("stored", [True, False], ids=["head stored", "head left out"])
@pytest.mark.parametrize("adapted", [EMBED, "lm_head"])
def test_of_a_tied_table_only_the_use_that_was_trained_changes(adapted, stored, llava, tmp_path):
    """PEFT wraps one module; the other goes on with the table as it was."""
    name, head = "decoder.embed_tokens.weight", "decoder.lm_head.weight"
    table = base(name)
    if stored:
        edit_tensors(llava, {"lm_head.weight": table})
    assert open_checkpoint(llava).config.decoder.tied
    if adapted == EMBED:
        tensors = {
            f"{PREFIX}{EMBED}.lora_embedding_A": torch.ones(1, 512),
            f"{PREFIX}{EMBED}.lora_embedding_B": torch.ones(64, 1),
        }
    else:
        tensors = {
            f"{PREFIX}lm_head.lora_A.weight": torch.ones(1, 64),
            f"{PREFIX}lm_head.lora_B.weight": torch.ones(512, 1),
        }
    opened = open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors, lora_alpha=1))
    changed, same = (name, head) if adapted == EMBED else (head, name)
    assert not opened.config.decoder.tied
    np.testing.assert_array_equal(opened.weights[changed].array(), (table + 1).numpy())
    np.testing.assert_array_equal(opened.weights[same].array(), table.numpy())


def test_a_head_that_was_trained_whole_unties_the_table(llava, tmp_path):
    tensors = {f"{PREFIX}lm_head.weight": torch.ones(512, 64)}
    opened = open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors))
    assert not opened.config.decoder.tied
    assert (opened.weights["decoder.lm_head.weight"].array() == 1).all()


@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
def test_a_merge_beyond_float32_is_refused_by_name_and_step(recipe, llava, tmp_path):
    """Every half is finite; their product is not, and no bundle holds it."""
    tensors = {name: 1e37 * half for name, half in low_rank(QUERY, 64, 64, 4).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    bundle = tmp_path / "bundle"
    name = "decoder.layers.0.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match=rf"'{name}' holds \d+ values .* after merging the adapter"):
        export(open_checkpoint(llava, adapter), bundle, recipe=load_recipe(recipe), targets=["onnx"])
    assert not bundle.exists()
