import math

import numpy as np
import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe
from tests.adapters import PREFIX, low_rank, write_adapter
from tests.checkpoints import HF, LLAVA, edit_tensors, golden_checkpoint, tree_state

QUERY = "model.layers.0.self_attn.q_proj"
KEY = "model.layers.1.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"
EMBED = "model.embed_tokens"


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


def half(side):
    return {k: v for k, v in low_rank(QUERY, 64, 64, 4).items() if f"lora_{side}" in k}


CONV = "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv"
PLAIN = low_rank(QUERY, 64, 64, 4)
REFUSED = {
    "DoRA": (PLAIN, {"use_dora": True}, "use_dora is set; only plain LoRA"),
    "QALoRA": (PLAIN, {"use_qalora": True}, "use_qalora is set"),
    "activated LoRA": (PLAIN, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    "transposed": (PLAIN, {"fan_in_fan_out": True}, "fan_in_fan_out is set"),
    "another method": (PLAIN, {"peft_type": "IA3"}, "peft_type is 'IA3'; supported: 'LORA'"),
    "PiSSA": (PLAIN, {"init_lora_weights": "pissa_niter_4"}, "is 'pissa_niter_4', which also"),
    "OLoRA": (PLAIN, {"init_lora_weights": "olora"}, "is 'olora', which also"),
    "only A": (half("A"), {}, f"the adapter of '{QUERY}.weight' is incomplete"),
    "only B": (half("B"), {}, "is incomplete"),
    "two ranks": (half("A") | {k: torch.ones(64, 5) for k in half("B")}, {}, "have different ranks"),
    "rank 0": (low_rank(QUERY, 64, 64, 0), {}, "have different ranks"),
    "unknown target": (
        low_rank("model.layers.9.mlp.up_proj", 176, 64, 4),
        {},
        "'model.layers.9.mlp.up_proj.weight', which the checkpoint does not have",
    ),
    "target of the other layout": (
        low_rank("model.language_model.layers.0.mlp.up_proj", 176, 64, 4),
        {},
        "which the checkpoint does not have",
    ),
    "unknown whole tensor": (
        {f"{PREFIX}model.extra.weight": torch.ones(2)},
        {},
        "'model.extra.weight', which the checkpoint does not have",
    ),
    "wrong output": (
        low_rank(QUERY, 65, 64, 4),
        {},
        r"has shape \[65, 64\], the checkpoint's tensor \[64, 64\]",
    ),
    "wrong input": (low_rank(QUERY, 64, 63, 4), {}, r"has shape \[64, 63\]"),
    "a kernel that is no matrix": (
        low_rank(CONV, 8, 3, 4),
        {},
        r"has shape \[8, 3\], the checkpoint's tensor \[8, 3, 3, 3\]",
    ),
    "a vector": (low_rank("model.norm", 64, 64, 4), {}, r"the checkpoint's tensor \[64\]"),
    "wrong whole tensor": ({f"{PREFIX}model.norm.weight": torch.ones(65)}, {}, r"has shape \[65\]"),
    "alpha as text": (PLAIN, {"lora_alpha": "8"}, "lora_alpha is '8', expected a number"),
    "alpha that is no number": (PLAIN, {"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "malformed pattern": (PLAIN, {"alpha_pattern": {"(q": 1}}, r"malformed pattern '\(q'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused(case, llava, tmp_path):
    tensors, config, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors, **config))
    assert str(tmp_path / "adapter") in str(caught.value)


def test_a_folder_that_is_no_adapter_is_refused(llava, tmp_path):
    with pytest.raises(CheckpointError, match=r"'adapter_config\.json' is missing"):
        open_checkpoint(llava, tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"'adapter_config\.json' is missing"):
        open_checkpoint(llava, llava)
    adapter = write_adapter(tmp_path / "adapter", low_rank(QUERY, 64, 64, 4))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        open_checkpoint(llava, adapter)


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
