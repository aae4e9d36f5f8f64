import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights.shapes import weight_shapes
from tests.checkpoints import (
    APPLE_VISION,
    HF,
    LLAVA,
    SETS,
    SHARDED,
    copy_checkpoint,
    edit_json,
    edit_tensors,
    golden_checkpoint,
    open_model,
    read_tensors,
    remove_weights,
    tree_state,
    write_tensors,
)

EMBED = "model.embed_tokens.weight"
QKV = f"{APPLE_VISION}network.7.0.token_mixer.qkv.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def write_bin(folder, dtype=torch.float32, num_shards=1):
    """Store a checkpoint's weights as torch does, in one file or in shards with an index."""
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in read_tensors(folder).items()}
    remove_weights(folder)
    if num_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    names = sorted(tensors)
    weight_map = {}
    for i in range(num_shards):
        file = f"pytorch_model-{i + 1:05}-of-{num_shards:05}.bin"
        part = {k: tensors[k] for k in names[i::num_shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def assert_same_weights(ours, theirs):
    assert set(ours.weights) == set(theirs.weights)
    for name, weight in theirs.weights.items():
        np.testing.assert_array_equal(ours.weights[name].array(), weight.array(), err_msg=name)


# What is found


@pytest.mark.parametrize("name", SETS)
def test_every_weight_of_the_model_is_there_with_its_shape(name):
    checkpoint = golden_checkpoint(name)
    expected = weight_shapes(checkpoint.config)
    assert {n: w.shape for n, w in checkpoint.weights.items()} == expected
    assert all(w.array().shape == expected[n] for n, w in checkpoint.weights.items())


def test_dimensions_are_those_the_checkpoints_were_made_with():
    for name in SETS:
        spec = json.loads((golden_checkpoint(name).path.parent / "golden.json").read_text())["spec"]
        config = golden_checkpoint(name).config
        assert [s.width for s in config.vision.stages] == spec["dims"]
        assert [s.depth for s in config.vision.stages] == spec["layers"]
        assert [s.mixer for s in config.vision.stages] == ["conv"] * 3 + ["attention"] * 2
        assert config.vision.image_size == spec["image"]
        assert config.vision.num_image_tokens == (spec["image"] // 64) ** 2
        decoder = config.decoder
        assert (decoder.hidden_size, decoder.intermediate_size) == (spec["hidden"], spec["inter"])
        assert (decoder.num_heads, decoder.num_kv_heads) == (spec["heads"], spec["kv_heads"])
        assert (decoder.num_layers, decoder.vocab_size) == (spec["text_layers"], spec["vocab"])
        assert decoder.head_dim == spec["hidden"] // spec["heads"]
        assert decoder.tied == spec["tied"]


def test_both_layouts_of_one_model_hold_the_same_weights():
    assert_same_weights(golden_checkpoint(HF), golden_checkpoint(LLAVA))


@pytest.mark.parametrize("name", SETS)
def test_nothing_but_known_leftovers_is_unused(name):
    allowed = re.compile(r"num_batches_tracked$|\.head\.proj$")
    unused = golden_checkpoint(name).unused
    assert all(allowed.search(n) for n in unused)
    assert sum(n.endswith("num_batches_tracked") for n in unused) == 6
    assert golden_checkpoint(name).disagreements == ()


def test_tensors_that_nothing_reads_are_listed(llava):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.surprise": torch.ones(2),
        "something.else": torch.zeros(1),
        f"{APPLE_VISION}classifier.weight": torch.ones(3),
    }
    before = set(open_checkpoint(llava).unused)
    edit_tensors(llava, extra)
    checkpoint = open_checkpoint(llava)
    assert set(checkpoint.unused) == before | set(extra)
    assert list(checkpoint.unused) == sorted(checkpoint.unused)


def test_files_and_hash_cover_what_was_read(sharded):
    (sharded / "LICENSE").write_text("research only")
    (sharded / "notes.txt").write_text("not part of it")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.license == sharded / "LICENSE"
    names = {path.name for path in checkpoint.files}
    assert names == {path.name for path in sharded.iterdir()} - {"notes.txt"}
    digest = content_hash(checkpoint.files)
    assert content_hash(reversed(checkpoint.files)) == digest
    for path in checkpoint.files:
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert content_hash(checkpoint.files) != digest, path.name
        path.write_bytes(content)
    assert golden_checkpoint(SHARDED).license is None


def test_the_hash_does_not_depend_on_the_place(llava, tmp_path):
    other = copy_checkpoint(LLAVA, tmp_path / "elsewhere")
    assert content_hash(open_checkpoint(llava).files) == content_hash(open_checkpoint(other).files)


@pytest.mark.parametrize("name", SETS)
def test_a_checkpoint_is_never_written_to(name, tmp_path):
    folder = copy_checkpoint(name, tmp_path)
    before = tree_state(folder)
    open_model(folder)
    assert tree_state(folder) == before


def test_opening_imports_no_heavy_library(llava):
    script = (
        "import sys; from pathlib import Path\n"
        "from fastvlm_convert.checkpoint.checkpoint import open_checkpoint\n"
        "open_checkpoint(Path(sys.argv[1]))\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'coremltools', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, llava], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The ways to store it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_torch_files_hold_the_same_model(dtype, num_shards, llava):
    stored = write_bin(llava, dtype, num_shards)
    before = tree_state(llava)
    checkpoint = open_checkpoint(llava)
    assert len(checkpoint.stored) == len(stored)
    for name, weight in checkpoint.stored.items():
        if stored[name].is_floating_point():
            np.testing.assert_array_equal(weight.array(), stored[name].float().numpy(), err_msg=name)
    if dtype == torch.float32:
        assert_same_weights(checkpoint, golden_checkpoint(LLAVA))
    open_model(llava)
    assert tree_state(llava) == before


def test_one_file_and_shards_hold_the_same_model(sharded):
    write_tensors(sharded, read_tensors(sharded))
    assert_same_weights(open_checkpoint(sharded), golden_checkpoint(SHARDED))


def test_safetensors_come_before_torch_files(llava):
    (llava / "pytorch_model.bin").write_bytes(b"not read")
    assert_same_weights(open_checkpoint(llava), golden_checkpoint(LLAVA))


def test_the_index_decides_between_two_copies_of_a_tensor(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = "model.norm.weight"
    other = next(f for f in sorted(set(weight_map.values()), reverse=True) if f != weight_map[name])
    (sharded / "tmp").mkdir()
    for file in (weight_map[name], other):
        (sharded / file).rename(sharded / "tmp" / file)
        tensors = read_tensors(sharded / "tmp")
        value = 1.0 if file == weight_map[name] else 2.0
        write_tensors(sharded / "tmp", tensors | {name: torch.full((112,), value)})
        (sharded / "tmp" / "model.safetensors").rename(sharded / file)
    assert (open_checkpoint(sharded).weights["decoder.norm.weight"].array() == 1.0).all()


def test_dimensions_of_one_are_no_matter_but_rows_are(llava):
    scale = f"{APPLE_VISION}network.0.0.layer_scale"
    original = read_tensors(llava)
    edit_tensors(llava, {scale: original[scale].reshape(8)})
    assert_same_weights(open_checkpoint(llava), golden_checkpoint(LLAVA))
    edit_tensors(llava, {scale: original[scale].reshape(1, 8)})
    with pytest.raises(CheckpointError, match=r"ffn_scale' has shape \[1, 8\], expected \[8\]"):
        open_checkpoint(llava)


# Tying


def test_a_head_equal_to_the_embedding_is_tied_whatever_the_config_says(llava):
    for said in (True, False):
        edit_tensors(llava, {"lm_head.weight": read_tensors(llava)[EMBED]})
        edit_json(llava / "config.json", {"tie_word_embeddings": said})
        checkpoint = open_checkpoint(llava)
        assert checkpoint.config.decoder.tied
        assert "decoder.lm_head.weight" not in checkpoint.weights
        assert "lm_head.weight" in checkpoint.unused
        found = [(d.key, d.config, d.tensors) for d in checkpoint.disagreements]
        assert found == ([] if said else [("tie_word_embeddings", False, True)])


def test_a_head_that_differs_in_one_number_is_not_tied(llava):
    head = read_tensors(llava)[EMBED].clone()
    head[-1, -1] += 1e-3
    edit_tensors(llava, {"lm_head.weight": head})
    checkpoint = open_checkpoint(llava)
    assert not checkpoint.config.decoder.tied
    np.testing.assert_array_equal(checkpoint.weights["decoder.lm_head.weight"].array(), head.numpy())
    assert [(d.key, d.config, d.tensors) for d in checkpoint.disagreements] == [
        ("tie_word_embeddings", True, False)
    ]


# What the config gets wrong


def test_disagreements_name_key_claim_and_truth(hf):
    text = json.loads((hf / "config.json").read_text())["text_config"]
    wrong = {"num_hidden_layers": 24, "vocab_size": 151936, "intermediate_size": 4864, "hidden_size": 896}
    wrong |= {"num_key_value_heads": 4, "head_dim": 64}
    vision = {"hidden_size": 3072, "model_args": {"layers": [2, 12, 24, 4, 2], "embed_dims": [96]}}
    edit_json(
        hf / "config.json",
        {
            "text_config": text | wrong,
            "vision_config": vision,
            "image_seq_length": 256,
            "tie_word_embeddings": False,
        },
    )
    checkpoint = open_checkpoint(hf)
    assert {d.key: (d.config, d.tensors) for d in checkpoint.disagreements} == {
        "num_hidden_layers": (24, 2),
        "vocab_size": (151936, 512),
        "intermediate_size": (4864, 176),
        "hidden_size": (896, 64),
        "num_key_value_heads": (4, 2),
        "head_dim": (64, 16),
        "tie_word_embeddings": (False, True),
        "vision_config.hidden_size": (3072, 256),
        "vision_config.model_args.layers": ([2, 12, 24, 4, 2], [1, 1, 2, 1, 1]),
        "vision_config.model_args.embed_dims": ([96], [8, 16, 32, 64, 128]),
        "image_seq_length": (256, 16),
    }
    assert checkpoint.config == golden_checkpoint(HF).config


def test_disagreements_of_apples_layout(llava):
    edit_json(llava / "config.json", {"mm_hidden_size": 3072, "num_hidden_layers": 3, "vocab_size": 500})
    found = {d.key: (d.config, d.tensors) for d in open_checkpoint(llava).disagreements}
    assert found == {"mm_hidden_size": (3072, 256), "num_hidden_layers": (3, 2), "vocab_size": (500, 512)}


def test_the_image_size_is_found_where_each_layout_has_it(llava, hf):
    edit_json(llava / "config.json", {"mm_vision_tower": "apple/mobileclip_l_1024"})
    assert open_checkpoint(llava).config.vision.image_size == 1024
    edit_json(hf / "preprocessor_config.json", {"crop_size": {"height": 512, "width": 512}})
    assert open_checkpoint(hf).config.vision.image_size == 512
    (hf / "preprocessor_config.json").unlink()
    assert open_checkpoint(hf).config.vision.image_size == 256  # 16 image tokens


def test_the_image_mode_is_what_the_original_code_does(llava):
    for said, mode in (("pad", "pad"), ("square", "crop"), (None, "crop")):
        edit_json(llava / "config.json", {"image_aspect_ratio": said})
        assert open_checkpoint(llava).image_mode == mode
    edit_json(llava / "config.json", remove=["image_aspect_ratio"])
    assert open_checkpoint(llava).image_mode == "pad"


def test_end_tokens_come_from_generation_config_then_config_then_tokenizer(llava):
    assert open_checkpoint(llava).eos_token_ids == (431, 429)
    edit_json(llava / "generation_config.json", {"eos_token_id": 7})
    assert open_checkpoint(llava).eos_token_ids == (7,)
    edit_json(llava / "generation_config.json", remove=["eos_token_id"])
    assert open_checkpoint(llava).eos_token_ids == (431,)
    (llava / "generation_config.json").unlink()
    edit_json(llava / "config.json", {"eos_token_id": None})
    assert open_checkpoint(llava).eos_token_ids == (431, 429)
