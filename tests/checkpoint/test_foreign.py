"""Input of other kinds: valid input is taken and said, everything else is named, with the next step."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import CheckpointError
from tests.adapters import low_rank, write_adapter
from tests.checkpoints import (
    APPLE_VISION,
    GOLDEN,
    HF,
    LLAVA,
    TIMM_VISION,
    edit_json,
    edit_tensors,
    golden_checkpoint,
    read_tensors,
    remove_weights,
    write_tensors,
)

QUERY = "model.layers.0.self_attn.q_proj"
INDEX = "model.safetensors.index.json"


def assert_same_model(checkpoint, name=LLAVA):
    expected = golden_checkpoint(name)
    assert checkpoint.config == expected.config
    assert set(checkpoint.weights) == set(expected.weights)
    for key, weight in expected.weights.items():
        np.testing.assert_array_equal(checkpoint.weights[key].array(), weight.array(), err_msg=key)


# Taken, and said


@pytest.mark.parametrize("model_type", ["llava_llama", "fastvlm", None, 7])
def test_the_tensors_decide_about_an_unknown_model_type(model_type, llava, hf):
    for folder, name, layout in ((llava, LLAVA, "llava_qwen2"), (hf, HF, "fast_vlm")):
        edit_json(folder / "config.json", {"model_type": model_type})
        checkpoint = open_checkpoint(folder)
        assert checkpoint.layout == layout
        assert_same_model(checkpoint, name)
        assert any(note.startswith("model_type is ") and layout in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "base_model.model.", "module.base_model.model._orig_mod.", "ema.student."],
)
def test_what_stands_before_every_name_is_left_out_and_said(prefix, llava):
    write_tensors(llava, {prefix + name: tensor for name, tensor in read_tensors(llava).items()})
    checkpoint = open_checkpoint(llava)
    assert_same_model(checkpoint)
    assert checkpoint.notes == (f"every tensor's name begins with '{prefix}', which was left out",)
    assert checkpoint.unused == golden_checkpoint(LLAVA).unused


def test_a_part_that_was_compiled_by_itself_is_read(llava):
    tensors = read_tensors(llava)
    write_tensors(llava, {n.replace("model.layers", "model._orig_mod.layers"): t for n, t in tensors.items()})
    assert_same_model(open_checkpoint(llava))


@pytest.mark.parametrize("key", ["module", "state_dict"])
def test_weights_inside_a_larger_dictionary_are_found(key, llava):
    tensors = read_tensors(llava)
    remove_weights(llava)
    torch.save({key: tensors, "epoch": 3, "optimizer": {"lr": 0.1}}, llava / "pytorch_model.bin")
    checkpoint = open_checkpoint(llava)
    assert_same_model(checkpoint)
    assert [note[:40] for note in checkpoint.notes] == (
        ["every tensor's name begins with 'module."] if key == "module" else []
    )


def shard(folder, count=3, suffix="safetensors"):
    tensors = read_tensors(folder)
    remove_weights(folder)
    names = sorted(tensors)
    for i in range(count):
        part = {name: tensors[name].contiguous() for name in names[i::count]}
        if suffix == "bin":
            torch.save(part, folder / f"pytorch_model-{i + 1:05}-of-{count:05}.bin")
        else:
            save_file(part, folder / f"model-{i + 1:05}-of-{count:05}.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_without_an_index_are_read_when_all_are_there(suffix, llava):
    shard(llava, suffix=suffix)
    checkpoint = open_checkpoint(llava)
    assert_same_model(checkpoint)
    assert "the index of the shards is missing" in checkpoint.notes[0]
    assert len([path for path in checkpoint.files if path.suffix == f".{suffix}"]) == 3
    sorted(llava.glob(f"*.{suffix}"))[1].unlink()
    with pytest.raises(CheckpointError, match="shards 2 of 3 are missing, and so is the index") as caught:
        open_checkpoint(llava)
    assert caught.value.hint


def test_shards_of_two_checkpoints_are_not_mixed(llava):
    shard(llava)
    (llava / "model-00003-of-00004.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="shards 4 of 4 are missing"):
        open_checkpoint(llava)
    (llava / "model-00003-of-00004.safetensors").unlink()
    (llava / "model-00002-of-00002.safetensors").write_bytes(
        (llava / "model-00002-of-00003.safetensors").read_bytes()
    )
    (llava / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="its shards are of two checkpoints"):
        open_checkpoint(llava)


def test_one_tensor_in_two_shards_needs_the_index(llava):
    shard(llava)
    first = llava / "model-00001-of-00003.safetensors"
    (llava / "model-00002-of-00003.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="is in two shards, and there is no index"):
        open_checkpoint(llava)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_settings_in_other_encodings_are_read(encoding, llava):
    for name in ("config.json", "generation_config.json"):
        text = (llava / name).read_text(encoding="utf-8")
        (llava / name).write_text(text, encoding=encoding)
    assert_same_model(open_checkpoint(llava))


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"sliding_window": 2048, "max_position_embeddings": 2048, "max_window_layers": 0}, True),
        ({"sliding_window": 4096, "max_position_embeddings": 2048, "max_window_layers": 1}, True),
        ({"sliding_window": 1024, "max_position_embeddings": 2048, "max_window_layers": 2}, True),
        ({"sliding_window": 1024, "max_position_embeddings": 2048}, True),  # from layer 28 on
        ({"sliding_window": None, "max_position_embeddings": 2048, "max_window_layers": 0}, True),
        ({"sliding_window": 1024, "max_position_embeddings": 2048, "max_window_layers": 1}, False),
        ({"sliding_window": True, "max_position_embeddings": 2048, "max_window_layers": 0}, False),
    ],
)
def test_a_sliding_window_that_slides_nowhere_is_taken(settings, taken, llava):
    """transformers' Qwen2: it holds for the layers from `max_window_layers` (28) on."""
    edit_json(llava / "config.json", {"use_sliding_window": True, **settings})
    if taken:
        assert_same_model(open_checkpoint(llava))
    else:
        with pytest.raises(CheckpointError, match="use_sliding_window is true, and its window of"):
            open_checkpoint(llava)


# A projector or an encoder of its own


def projector_of(folder, prefix="model.mm_projector."):
    tensors = read_tensors(folder)
    return {n.removeprefix(prefix): 2 * t for n, t in tensors.items() if n.startswith(prefix)}


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "", "module.model.mm_projector."])
def test_a_projector_of_its_own_takes_the_place(prefix, llava, tmp_path):
    path = tmp_path / "mm_projector.bin"
    torch.save({prefix + name: tensor for name, tensor in projector_of(llava).items()}, path)
    edit_tensors(llava, remove=["model.mm_projector.0.weight", "model.mm_projector.2.bias"])
    checkpoint = open_checkpoint(llava, projector=path)
    for name, weight in golden_checkpoint(LLAVA).weights.items():
        factor = 2 if name.startswith("projector.") else 1
        np.testing.assert_array_equal(checkpoint.weights[name].array(), factor * weight.array())
    assert path in checkpoint.files
    assert path.parent in checkpoint.folders


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", [LLAVA, HF])
@pytest.mark.parametrize("prefix", ["", "image_encoder.model.", "stored"])
def test_a_tower_of_its_own_takes_the_place(prefix, name, suffix, llava, tmp_path):
    stored = APPLE_VISION if name == LLAVA else TIMM_VISION
    tensors = read_tensors(GOLDEN / name / "checkpoint")
    tower = {n.removeprefix(stored): 2 * t for n, t in tensors.items() if n.startswith(stored)}
    tower = {(stored if prefix == "stored" else prefix) + n: t.contiguous() for n, t in tower.items()}
    tower |= {"text_encoder.transformer.0.weight": torch.ones(2)}
    path = tmp_path / f"tower{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tower, path)
    edit_tensors(llava, remove=[n for n in read_tensors(llava) if "vision_tower" in n])
    checkpoint = open_checkpoint(llava, vision_tower=path)
    for key, weight in golden_checkpoint(LLAVA).weights.items():
        factor = 2 if key.startswith("vision.") else 1
        np.testing.assert_array_equal(checkpoint.weights[key].array(), factor * weight.array(), err_msg=key)


def test_files_that_hold_no_such_part_are_refused(llava, tmp_path):
    path = tmp_path / "part.safetensors"
    save_file({"model.norm.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="it holds 0 of a projector's four tensors"):
        open_checkpoint(llava, projector=path)
    with pytest.raises(CheckpointError, match="it holds no FastViTHD"):
        open_checkpoint(llava, vision_tower=path)
    with pytest.raises(CheckpointError, match=r"'gone\.bin' is missing"):
        open_checkpoint(llava, projector=tmp_path / "gone.bin")


def test_what_is_missing_names_the_option_that_brings_it(llava):
    edit_tensors(llava, remove=[n for n in read_tensors(llava) if "mm_projector" in n])
    with pytest.raises(CheckpointError, match=r"'projector\.fc1\.weight' is missing") as caught:
        open_checkpoint(llava)
    assert "--projector FILE" in caught.value.hint
    edit_tensors(llava, remove=[n for n in read_tensors(llava) if "vision_tower" in n])
    with pytest.raises(CheckpointError, match="it has no vision encoder") as caught:
        open_checkpoint(llava)
    assert "--vision-tower FILE" in caught.value.hint


# Named


def write(name, content=b""):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def only(*changes):
    """A folder without weights, with something else in it."""

    def change(folder):
        remove_weights(folder)
        for one in changes:
            one(folder)

    return change


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", changes)


def tensors(**changes):
    return lambda folder: edit_tensors(folder, {n.replace("__", "."): t for n, t in changes.items()})


def as_adapter(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    write_adapter(folder, low_rank(QUERY, 64, 64, 4), base_model_name_or_path="apple/FastVLM-0.5B")


def zero_3(folder):
    edit_tensors(folder, {n: torch.zeros(0) for n in read_tensors(folder)})


def as_bin(content):
    return lambda folder: (remove_weights(folder), write("pytorch_model.bin", content)(folder))


PAGE = b"<!DOCTYPE html>\n<html><body>Log in to continue</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
PACKED = torch.zeros(64, 8, dtype=torch.int32)

NAMED = {
    "an adapter": (
        as_adapter,
        "this is an adapter, not a checkpoint",
        "the checkpoint it was trained on ('apple/FastVLM-0.5B'), and this folder with --adapter",
    ),
    "ZeRO partitions": (
        only(write("global_step500/mp_rank_00_model_states.pt"), write("latest", b"global_step500")),
        "DeepSpeed ZeRO's partitions",
        "python zero_to_fp32.py . pytorch_model.bin",
    ),
    "tensors that ZeRO-3 left empty": (zero_3, r"has shape \[0\]: DeepSpeed ZeRO-3", "zero_to_fp32.py"),
    "a distributed checkpoint": (only(write("__0_0.distcp")), "a distributed checkpoint", "dcp_to_torch"),
    "accelerate's": (only(write("pytorch_model_fsdp_0/x")), "a distributed checkpoint", "merge-weights"),
    "a projector alone": (only(write("mm_projector.bin")), "LLaVA's projector alone", "--projector"),
    "GGUF": (only(write("fastvlm-q4_k.gguf", b"GGUF")), "a GGUF model", "it was converted from"),
    "GGUF as safetensors": (
        write("model.safetensors", b"GGUF\x03\0\0\0" + bytes(99)), "it is a GGUF file", "converted from",
    ),
    "a Core ML package": (only(write("fastvithd.mlpackage/Manifest.json")), "a Core ML package", "`mil`"),
    "ONNX": (only(write("onnx/vision_encoder.onnx")), "an ONNX model", "converted from"),
    "weights of another name": (
        only(write("consolidated.00.pth")), "no weights: neither model.safetensors", "consolidated.00.pth",
    ),
    "MLX": (config(quantization={"group_size": 64, "bits": 4}), r"by MLX \(4 bits\)", "unquantized"),
    "MLX without config": (tensors(model__norm__scales=torch.ones(2)), "scales' is MLX's", "unquantized"),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantized by 'bitsandbytes'", "unquantized",
    ),
    "bitsandbytes without config": (
        tensors(model__norm__weight__absmax=torch.ones(2)), r"is bitsandbytes \(4 bits\)'s", "unquantized",
    ),
    "bitsandbytes int8": (tensors(model__norm__SCB=torch.ones(2)), r"bitsandbytes \(int8\)'s", "unquantized"),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "'gptq'", "unquantized"),
    "GPTQ without config": (
        tensors(model__layers__0__mlp__up_proj__qweight=PACKED), "GPTQ or AWQ's", "unquantized",
    ),
    "AWQ": (config(quantization_config={"quant_method": "awq"}), "quantized by 'awq'", "unquantized"),
    "FP8": (config(quantization_config={"quant_method": "fp8"}), "quantized by 'fp8'", "unquantized"),
    "FP8 without config": (
        lambda f: edit_tensors(f, {"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
        "'model.norm.weight' has dtype F8_E4M3", "unquantized",
    ),
    "compressed-tensors": (
        tensors(model__norm__weight_packed=PACKED), "compressed-tensors's", "unquantized",
    ),
    "adapters that are not merged": (
        tensors(model__layers__0__self_attn__q_proj__lora_A__default__weight=torch.ones(2, 64)),
        "LoRA adapters that are not merged", "merge_and_unload",
    ),
    "an LFS pointer": (write("model.safetensors", POINTER), "it is a Git LFS pointer", "git lfs pull"),
    "an LFS pointer as .bin": (as_bin(POINTER), "it is a Git LFS pointer", "git lfs pull"),
    "a web page": (write("model.safetensors", PAGE), "it is a web page", "download it again"),
    "a web page as .bin": (as_bin(b"\n  " + PAGE), "it is a web page", "hf auth login"),
    "an error as JSON": (as_bin(b'{"error": "Repository not found"}'), "it is JSON, not weights", "download"),
    "a torch file as safetensors": (
        write("model.safetensors", b"PK\x03\x04" + bytes(99)), "as torch.save writes it", "pytorch_model.bin",
    ),
    "safetensors as .bin": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "it is a safetensors file", "name it model.safetensors",
    ),
    "compressed": (as_bin(b"\x1f\x8b\x08" + bytes(20)), "compressed with gzip", "unpack"),
    "an empty file": (write("model.safetensors"), "it is empty", "download it again"),
    "weights that are a link to nothing": (
        only(lambda f: (f / "model.safetensors").symlink_to("gone")), "a link to gone, which is missing", "",
    ),
    "a config that is a link to nothing": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("gone")),
        "it is a link to gone, which is missing", "",
    ),
    "a generation config that is a link to nothing": (
        lambda f: (
            (f / "generation_config.json").unlink(), (f / "generation_config.json").symlink_to("gone"),
        ),
        "it is a link to gone, which is missing", "",
    ),
    "a link to nothing as the license": (
        lambda f: (f / "LICENSE").symlink_to("gone"), "a link to gone, which is missing", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_input_of_another_kind_is_named(case, llava):
    change, message, hint = NAMED[case]
    change(llava)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(llava).sha256  # noqa: B018  the license is read for the hash
    assert hint in (caught.value.hint or "")


def test_a_bundle_is_no_checkpoint(fp32_bundle):
    with pytest.raises(CheckpointError, match="this is a bundle, not a checkpoint") as caught:
        open_checkpoint(fp32_bundle)
    assert "`run`, `verify` and `bench`" in caught.value.hint


def test_an_empty_path_is_said(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("", ".", Path()):
        with pytest.raises(CheckpointError, match="the checkpoint's path is empty"):
            open_checkpoint(path)
    monkeypatch.chdir(llava)
    assert_same_model(open_checkpoint("."))


def test_a_torch_file_of_another_byte_order_is_refused(llava):
    torch.save(read_tensors(llava), llava / "pytorch_model.bin")
    (llava / "model.safetensors").unlink()
    path = llava / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)
    with pytest.raises(CheckpointError, match="stores the high byte of a number first"):
        open_checkpoint(llava)


def test_a_key_that_stands_twice_is_refused(llava):
    text = (llava / "config.json").read_text()
    (llava / "config.json").write_text(text.replace("{", '{"vocab_size": 1, "vocab_size": 2,', 1))
    with pytest.raises(CheckpointError, match="the key 'vocab_size' stands twice"):
        open_checkpoint(llava)


def test_mlx_of_float_weights_is_not_taken_for_quantized(llava):
    edit_json(llava / "config.json", {"quantization": None, "quantization_config": None})
    assert_same_model(open_checkpoint(llava))
    assert json.loads((llava / "config.json").read_text())["quantization"] is None
