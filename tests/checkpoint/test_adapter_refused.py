"""Adapters that cannot be merged: each is an error that says what is wrong and what to do."""

import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import CheckpointError
from tests.adapters import PREFIX, low_rank, write_adapter

QUERY = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"
CONV = "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv"
PLAIN = low_rank(QUERY, 64, 64, 4)


def half(side):
    return {k: v for k, v in low_rank(QUERY, 64, 64, 4).items() if f"lora_{side}" in k}


DEPTHWISE = "model.vision_tower.vision_tower.model.patch_embed.1.reparam_conv"
REFUSED = {
    "DoRA": (PLAIN, {"use_dora": True}, "use_dora is set; only plain LoRA"),
    "QALoRA": (PLAIN, {"use_qalora": True}, "use_qalora is set"),
    "activated LoRA": (PLAIN, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    "another method": (PLAIN, {"peft_type": "IA3"}, "peft_type is 'IA3'; supported: 'LORA'"),
    "PiSSA": (PLAIN, {"init_lora_weights": "pissa_niter_4"}, "is 'pissa_niter_4', which also"),
    "OLoRA": (PLAIN, {"init_lora_weights": "olora"}, "is 'olora', which also"),
    "only A": (half("A"), {}, f"the adapter of '{QUERY}.weight' is incomplete"),
    "only B": (half("B"), {}, "is incomplete"),
    "two ranks": (half("A") | {k: torch.ones(64, 5) for k in half("B")}, {}, "have different ranks"),
    "three axes": (
        half("B") | {k: t[..., None] for k, t in half("A").items()},
        {},
        rf"lora_A of '{QUERY}.weight' has shape \[4, 64, 1\], expected \[rank, columns\]",
    ),
    "several adapters": (
        PLAIN | {k.replace(".weight", ".other.weight"): t + 1 for k, t in PLAIN.items()},
        {},
        "it holds several adapters: default, other",
    ),
    "DoRA's vector": (
        PLAIN | {f"{PREFIX}{QUERY}.lora_magnitude_vector": torch.ones(64)},
        {},
        "lora_magnitude_vector', which is no part of plain LoRA",
    ),
    "LoRA's own bias": (
        PLAIN | {f"{PREFIX}{QUERY}.lora_B.bias": torch.ones(64)},
        {},
        "lora_B.bias', which is no part",
    ),
    "parameters as targets": (PLAIN, {"target_parameters": ["q_proj.weight"]}, "target_parameters is set"),
    "replicated layers": (PLAIN, {"layer_replication": [[0, 2]]}, "layer_replication is set"),
    "virtual tokens": (PLAIN, {"peft_type": "PROMPT_TUNING"}, "it adds inputs to the model"),
    "saved by ZeRO-3": (
        {k: torch.zeros(0) for k in PLAIN},
        {},
        r"has shape \[0\]: DeepSpeed ZeRO-3 saved it without gathering its parts",
    ),
    "no tensor": ({}, {}, "the adapter holds no tensor"),
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
    "rows of tokens that are not named": (
        {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(2, 64)},
        {"trainable_token_indices": {"lm_head": [1, 2]}},
        f"'{EMBED}' has 2 trained rows, which trainable_token_indices does not name",
    ),
    "a token twice": (
        {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(2, 64)},
        {"trainable_token_indices": [3, 3]},
        "does not name, each once",
    ),
    "rows of another width": (
        {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(2, 60)},
        {"trainable_token_indices": [3, 4]},
        r"has shape \[2, 60\], the checkpoint's tensor \[512, 64\]",
    ),
    "rows beyond the table": (
        {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(2, 64)},
        {"trainable_token_indices": [512, 514]},
        "trains token 514, but the table has 512 rows",
    ),
    "a resized table that is missing": (
        {
            f"{PREFIX}{EMBED}.lora_embedding_A": torch.ones(2, 520),
            f"{PREFIX}{EMBED}.lora_embedding_B": torch.ones(64, 2),
        },
        {},
        r"has shape \[520, 64\], the checkpoint's tensor \[512, 64\]",
    ),
    "a depthwise convolution": (
        {
            f"{PREFIX}{DEPTHWISE}.lora_A.weight": torch.ones(8, 8, 3, 3),
            f"{PREFIX}{DEPTHWISE}.lora_B.weight": torch.ones(8, 1, 1, 1),
        },
        {},
        "is a convolution in groups, whose adapter nothing can merge",
    ),
    "malformed pattern": (PLAIN, {"alpha_pattern": {"(q": 1}}, r"malformed pattern '\(q'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused(case, llava, tmp_path):
    tensors, config, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors, **config))
    assert str(tmp_path / "adapter") in str(caught.value)


NEXT_STEPS = {
    "DoRA": "merge_and_unload",
    "another method": "merge_and_unload",
    "parameters as targets": "merge_and_unload",
    "DoRA's vector": "merge_and_unload",
    "PiSSA": "path_initial_model_for_weight_conversion",
    "saved by ZeRO-3": "zero_to_fp32.py",
    "a resized table that is missing": "save_embedding_layers=True",
    "rows beyond the table": "save_embedding_layers=True",
    "a depthwise convolution": "target_modules",
    "unknown target": "in the other layout",
}


@pytest.mark.parametrize("case", NEXT_STEPS)
def test_the_next_step_is_said(case, llava, tmp_path):
    tensors, config, _ = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(llava, write_adapter(tmp_path / "adapter", tensors, **config))
    assert NEXT_STEPS[case] in caught.value.hint


def test_a_folder_that_is_no_adapter_is_refused(llava, tmp_path):
    with pytest.raises(CheckpointError, match="there is no such adapter"):
        open_checkpoint(llava, tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="an adapter is a folder, this is a file"):
        open_checkpoint(llava, llava / "config.json")
    with pytest.raises(CheckpointError, match="a whole checkpoint, not an adapter") as caught:
        open_checkpoint(llava, llava)
    assert "give it as CHECKPOINT" in str(caught.value.hint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"'adapter_config\.json' is missing"):
        open_checkpoint(llava, tmp_path / "empty")
    adapter = write_adapter(tmp_path / "adapter", low_rank(QUERY, 64, 64, 4))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        open_checkpoint(llava, adapter)
