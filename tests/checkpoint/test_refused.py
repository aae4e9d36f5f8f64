"""Damaged, hostile and impossible checkpoints: each is an error that says what is wrong and where."""

import json
import re

import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import CheckpointError
from tests.checkpoints import APPLE_VISION, edit_json, edit_tensors, open_model, read_tensors, write_tensors

EMBED = "model.embed_tokens.weight"
QKV = f"{APPLE_VISION}network.7.0.token_mixer.qkv.weight"
EXPAND = f"{APPLE_VISION}conv_exp.se.expand.weight"
FC2 = f"{APPLE_VISION}network.7.0.convffn.fc2.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"

# Each entry damages a checkpoint and says what the error must name.


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", changes)


def tensors(changes=None, remove=()):
    return lambda folder: edit_tensors(folder, changes, remove)


def resized(name, change):
    return lambda folder: edit_tensors(folder, {name: change(read_tensors(folder)[name])})


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def delete(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def without(pattern):
    """Remove all tensors whose name holds `pattern`."""
    return lambda folder: edit_tensors(
        folder, remove=[name for name in read_tensors(folder) if re.search(pattern, name)]
    )


def renumbered(old, new):
    def change(folder):
        renamed = {n.replace(old, new): t for n, t in read_tensors(folder).items()}
        write_tensors(folder, renamed)

    return change


REFUSED = {
    "no config": (delete("config.json"), r"'config.json' is missing"),
    "config is no JSON": (write("config.json", b"{"), "not valid JSON"),
    "config is not UTF-8": (write("config.json", b'{"a": "\xff"}'), "not valid JSON"),
    "config is a list": (write("config.json", b"[1]"), "expected a JSON object, found list"),
    "config with a number of 5000 digits": (
        write("config.json", b'{"model_type": ' + b"1" * 5000 + b"}"),
        "not valid JSON",
    ),
    "unknown model type and tensors": (
        lambda f: (
            config(model_type="llava_llama")(f),
            edit_tensors(f, remove=[n for n in read_tensors(f) if n.startswith(APPLE_VISION)]),
        ),
        "model_type is 'llava_llama'; supported: 'llava_qwen2', 'fast_vlm'",
    ),
    "no weights": (
        delete("model.safetensors"),
        "no weights: neither model.safetensors, pytorch_model.bin nor",
    ),
    "weights are text": (
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "not a safetensors file",
    ),
    "no encoder": (without(r"vision_tower"), "no vision encoder"),
    "no embedding": (tensors(remove=[EMBED]), "'decoder.embed_tokens.weight' is missing"),
    "a head but no embedding": (
        tensors({"lm_head.weight": torch.ones(512, 64)}, [EMBED]),
        "'decoder.embed_tokens.weight' is missing",
    ),
    "no projector": (tensors(remove=["model.mm_projector.0.weight"]), "'projector.fc1.weight' is missing"),
    "missing tensors": (
        tensors(remove=[NORM, UP, QKV.replace("qkv", "proj")]),
        "3 tensors are missing: vision.stages.3.blocks.0.attention.proj.weight, "
        "decoder.layers.1.mlp.up_proj.weight, decoder.norm.weight",
    ),
    "many missing tensors": (
        without(r"self_attn.*bias|layers\.1\.mlp"),
        r"9 tensors are missing: .* and 1 more",
    ),
    "a layer is missing": (
        without(r"model\.layers\.0\."),
        "'decoder.layers.0.self_attn.q_proj.weight' is missing",
    ),
    "an inner layer is missing": (
        renumbered("model.layers.1.", "model.layers.2."),
        "all tensors of 'decoder.layers.1' are missing",
    ),
    "an absurd layer number": (
        renumbered("model.layers.1.", "model.layers.999999."),
        "all tensors of 'decoder.layers.1' are missing",
    ),
    "an absurd block number": (
        renumbered("network.4.1.", "network.4.999999."),
        r"all tensors of 'vision.stages.2.blocks.1' are",
    ),
    "four stages": (without(r"network\.(8|9|10)\."), "its encoder has 4 stages, FastViTHD has 5"),
    "a projection of another width": (
        resized(UP, lambda t: t[:, :60]),
        r"'decoder.layers.1.mlp.up_proj.weight' has shape \[176, 60\], expected \[176, 64\]",
    ),
    "a transposed weight": (
        resized(UP, lambda t: t.t()),
        r"has shape \[64, 176\], expected \[176, 64\]",
    ),
    "an empty projection": (resized(QUERY, lambda t: t[:0]), r"q_proj.weight' has shape \[0, 64\]"),
    "empty keys": (resized(KEY, lambda t: t[:0]), r"k_proj.weight' has shape \[0, 64\]"),
    "a flat embedding": (resized(EMBED, lambda t: t.flatten()), r"embed_tokens.weight' has shape \[32768\]"),
    "an encoder width that is no multiple": (
        resized(EXPAND, lambda t: t[:250]),
        "width of 250 is no multiple of the 128",
    ),
    "an attention width without heads": (
        resized(FC2, lambda t: t[:48]),
        "stage 3 is 48 wide",
    ),
    "int8 weights": (
        lambda f: edit_tensors(f, {QKV: read_tensors(f)[QKV].to(torch.int8)}),
        "'vision.stages.3.blocks.0.attention.qkv.weight' is stored as int8; weights must be one of float32",
    ),
    "bool head": (
        tensors({"lm_head.weight": torch.ones(512, 64, dtype=torch.bool)}),
        "'lm_head.weight' is stored as bool",
    ),
    "heads that do not divide": (config(num_attention_heads=5), "num_attention_heads 5 does not fit"),
    "more heads than rows": (config(num_attention_heads=128), "num_attention_heads 128 does not fit"),
    "odd head size": (config(num_attention_heads=64), "num_attention_heads 64 does not fit"),
    "fewer heads than key heads": (config(num_attention_heads=1), "num_attention_heads 1 does not fit"),
    "negative heads": (
        config(num_attention_heads=-4),
        "num_attention_heads is -4, expected a positive integer",
    ),
    "heads as text": (config(num_attention_heads="4"), "num_attention_heads is '4'"),
    "heads as a truth": (config(num_attention_heads=True), "num_attention_heads is true"),
    "no heads": (config(num_attention_heads=None), "num_attention_heads is null"),
    "absurd epsilon": (config(rms_norm_eps=-1), "rms_norm_eps is -1, expected a positive number"),
    "epsilon that is no number": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "absurd rotary base": (config(rope_theta="big"), "rope_theta is 'big'"),
    "absurd positions": (config(max_position_embeddings=1 << 40), "max_position_embeddings is"),
    "scaled rotary positions": (
        config(rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_scaling is 'yarn'; supported: 'default'",
    ),
    "scaled rotary parameters": (config(rope_parameters={"rope_type": "yarn"}), "rope_scaling is 'yarn'"),
    "another activation": (config(hidden_act="relu"), "hidden_act is 'relu'; supported: 'silu'"),
    "sliding window": (
        config(use_sliding_window=True, sliding_window=64, max_window_layers=1),
        "use_sliding_window is true, and its window of 64 tokens is shorter than the context of 2048",
    ),
    "another projector": (config(mm_projector_type="linear"), "mm_projector_type is 'linear'"),
    "image start tokens": (config(mm_use_im_start_end=True), "mm_use_im_start_end is true"),
    "tiled images": (config(image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres'"),
    "no image size": (config(mm_vision_tower="mobileclip_l"), "the image size is not stated"),
    "an image size in between": (
        config(mm_vision_tower="mobileclip_l_300"),
        "image size 300 is no multiple of 64",
    ),
    "an absurd image size": (
        config(mm_vision_tower="mobileclip_l_6400"),
        "image size 6400 is no multiple of 64 up to 4096",
    ),
    "end token beyond the vocabulary": (
        write("generation_config.json", b'{"eos_token_id": 512}'),
        "eos_token_id is 512, expected ids below 512",
    ),
    "end token as text": (
        write("generation_config.json", b'{"eos_token_id": "431"}'),
        "eos_token_id is '431'",
    ),
    "no end tokens": (write("generation_config.json", b'{"eos_token_id": []}'), r"eos_token_id is \[\]"),
    "generation config is no JSON": (write("generation_config.json", b"?"), "not valid JSON"),
    "a tokenizer of another model": (
        lambda f: edit_tensors(f, {EMBED: read_tensors(f)[EMBED][:430]}),
        "the embedding table has 430 rows, but token ids go up to 431",
    ),
    "more logits than embeddings": (
        tensors({"lm_head.weight": torch.ones(600, 64)}),
        "table has 512 rows, but .* the head has 600 rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_with_a_clear_error(case, llava):
    damage, message = REFUSED[case]
    damage(llava)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(llava)
    assert str(llava) in str(caught.value)  # says where


def test_a_weight_that_is_nan_is_named_when_the_model_is_loaded(llava):
    embed = read_tensors(llava)[EMBED]
    embed[3, 5] = float("nan")
    edit_tensors(llava, {EMBED: embed})
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' holds 1 values that are NaN"):
        open_model(llava)


def test_a_place_that_holds_no_checkpoint_is_refused(llava, tmp_path):
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="this is a file"):
        open_checkpoint(llava / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'config.json' is missing"):
        open_checkpoint(tmp_path)


def index(**changes):
    return lambda folder: edit_json(folder / INDEX, changes)


def remapped(name, file):
    def change(folder):
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, {"weight_map": weight_map | {name: file}})

    return change


def cut(folder):
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(raw[:-1000])


REFUSED_SHARDS = {
    "a shard is missing": (delete(SHARD), f"'{SHARD}' is missing"),
    "a shard is truncated": (cut, "it is truncated"),
    "no map": (index(weight_map=None), "no weight_map"),
    "a map of numbers": (index(weight_map={"a": 1}), "no weight_map"),
    "index is no JSON": (write(INDEX, b"\x00"), "not valid JSON"),
    "an empty map": (index(weight_map={}), "no vision encoder"),
    "shard above the folder": (
        remapped(NORM, "../secret.safetensors"),
        r"shard '../secret.safetensors' lies outside",
    ),
    "shard at an absolute path": (remapped(NORM, "/etc/passwd"), "shard '/etc/passwd' lies outside"),
    "shard in a subfolder": (remapped(NORM, "a/b.safetensors"), "lies outside"),
    "shard is the folder": (remapped(NORM, ".."), "lies outside"),
    "shard without a name": (remapped(NORM, ""), "lies outside"),
    "shard with an impossible name": (remapped(NORM, "x" * 300), "cannot read: File name too long"),
    "shard with a zero in its name": (remapped(NORM, "a\0b"), "is missing"),
    "shard is a text": (remapped(NORM, "merges.txt"), "not a safetensors file"),
    "the index promises a tensor": (
        remapped("model.extra.weight", SHARD),
        f"'model.extra.weight' is not in '{SHARD}'",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SHARDS)
def test_a_bad_index_or_shard_is_refused(case, sharded):
    damage, message = REFUSED_SHARDS[case]
    (sharded.parent / "secret.safetensors").write_bytes((sharded / SHARD).read_bytes())
    damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


REFUSED_HF = {
    "unknown projector activation": (config(projector_hidden_act="relu"), "projector_hidden_act is 'relu'"),
    "scaled rotary positions": (
        config(text_config={"num_attention_heads": 4, "rope_parameters": {"rope_type": "linear"}}),
        "rope_scaling is 'linear'",
    ),
    "text settings without heads": (config(text_config={"hidden_size": 64}), "num_attention_heads is null"),
    "an image token count that is no square": (
        lambda f: (
            edit_json(f / "config.json", {"image_seq_length": 15}),
            delete("preprocessor_config.json")(f),
        ),
        "the image size is not stated",
    ),
    "crop size in between": (
        write("preprocessor_config.json", b'{"crop_size": {"height": 250}}'),
        "image size 250 is no",
    ),
}


@pytest.mark.parametrize("case", REFUSED_HF)
def test_transformers_layout_is_refused_with_a_clear_error(case, hf):
    damage, message = REFUSED_HF[case]
    damage(hf)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(hf)
