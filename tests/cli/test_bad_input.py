"""Bad input of every kind, through the command line: a clear error, exit code 2, nothing left behind."""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from fastvlm_convert.recipe import shipped_recipes
from tests.bundles import copy_bundle, edit_manifest, export_bundle, recipe
from tests.checkpoints import HF, LLAVA, SHARDED, copy_checkpoint, edit_json, edit_tensors, read_tensors
from tests.cli.conftest import CHECKPOINT, IMAGE, Cli
from tests.cli.test_errors import CODES

GATE = "model.layers.0.mlp.gate_proj.weight"
ONNX = ("--target", "onnx", "--recipe", "fp32")


@dataclass(frozen=True)
class Place:
    """Where a case puts its input; `output` is what must not appear."""

    folder: Path
    fp32_bundle: Path

    @property
    def output(self) -> Path:
        return self.folder / "out" / "bundle"

    def checkpoint(self, name: str = LLAVA) -> Path:
        found = self.folder / name
        return found if found.is_dir() else copy_checkpoint(name, self.folder)

    def bundle(self) -> Path:
        found = self.folder / "bundle"
        return found if found.is_dir() else copy_bundle(self.fp32_bundle, self.folder)

    def export(self, checkpoint: object, *more: object) -> tuple[object, ...]:
        return ("export", checkpoint, *ONNX, "-o", self.output, *more)

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


Prepare = Callable[[Place], tuple[object, ...]]
CASES: dict[str, tuple[Prepare, str, str | None]] = {}


def case(message: str, hint: str | None = None) -> Callable[[Prepare], Prepare]:
    """Register a case: what must be said, and what must be advised."""

    def register(prepare: Prepare) -> Prepare:
        CASES[prepare.__name__] = (prepare, message, hint)
        return prepare

    return register


def damaged(
    name: str, message: str, damage: Callable[[Path], object], hint: str | None = None, base: str = LLAVA
) -> None:
    """Register an export of a checkpoint that was damaged."""

    def prepare(place: Place) -> tuple[object, ...]:
        checkpoint = place.checkpoint(base)
        damage(checkpoint)
        return place.export(checkpoint)

    CASES[name] = (prepare, message, hint)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda c: edit_json(c / "config.json", changes)


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda c: (c / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(*names: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        for name in names:
            (checkpoint / name).unlink()

    return damage


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def header(**entries: object) -> Callable[[Path], None]:
    """A safetensors file with this header and no tensors."""

    def damage(checkpoint: Path) -> None:
        text = json.dumps(entries).encode()
        (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)

    return damage


def tensor(change: Callable[[torch.Tensor], torch.Tensor | None], name: str = GATE) -> Callable[[Path], None]:
    """Change one tensor, or remove it."""

    def damage(checkpoint: Path) -> None:
        value = change(read_tensors(checkpoint)[name].clone())
        edit_tensors(checkpoint, {} if value is None else {name: value}, [name] if value is None else [])

    return damage


def spoiled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = value
        return weight

    return change


# Weight files.
damaged("shard_truncated", "it is truncated (", cut("model.safetensors", 0.9), "download or copy")
damaged("header_truncated", "the safetensors header is truncated", cut("model.safetensors", 0.001))
damaged("text_named_safetensors", "not a safetensors file", write("model.safetensors", "weights, please\n"))
damaged(
    "html_named_safetensors", "not a safetensors file", write("model.safetensors", "<!DOCTYPE html>" * 99)
)
damaged("empty_safetensors", "not a safetensors file", write("model.safetensors", b""))
damaged(
    "lfs_pointer",
    "not a safetensors file",
    write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "git lfs pull",
)
damaged("weights_missing", "no weights: neither model.safetensors", remove("model.safetensors"))
damaged(
    "dtype_quantized",
    "is stored as int8; weights must be one of float32",
    tensor(lambda w: w.to(torch.int8)),
    "give the unquantized checkpoint",
)
damaged(
    "dtype_unknown",
    "has dtype F4; supported are F64",
    header(w={"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}),
)
damaged(
    "dimensions_absurd",
    "has an impossible shape [1099511627776]",
    header(w={"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}),
)
damaged(
    "dimensions_negative",
    "has an impossible shape [-1]",
    header(w={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}),
)
damaged(
    "sizes_contradict",
    "claims 8 bytes, but [3] of float32 need 12",
    header(w={"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}),
)
damaged("nan", f"tensor '{GATE}' holds 1 values that are NaN", tensor(spoiled(float("nan"))), "damaged")
damaged("infinity", f"tensor '{GATE}' holds 1 values that are NaN", tensor(spoiled(float("inf"))), "damaged")
damaged("tensor_missing", "decoder.layers.0.mlp.gate_proj.weight' is missing", tensor(lambda w: None))
damaged(
    "tensor_of_another_shape",
    "has shape [175, 64], expected",
    tensor(lambda w: w[:-1], GATE.replace("gate", "up")),
)
damaged(
    "encoder_missing",
    "it has no vision encoder",
    lambda c: edit_tensors(c, remove=[n for n in read_tensors(c) if "vision_tower" in n]),
)
damaged(
    "layer_missing",
    "tensor 'decoder.layers.0.self_attn.q_proj.weight' is missing",
    lambda c: edit_tensors(c, remove=[n for n in read_tensors(c) if ".layers.0." in n]),
)


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors.index.json"
        value = json.loads(path.read_text())
        change(value["weight_map"])
        path.write_text(json.dumps(value))

    return damage


FIRST = "model.embed_tokens.weight"
damaged(
    "index_points_outside",
    "shard '../secret.safetensors' lies outside the checkpoint's folder",
    index(lambda m: m.update({FIRST: "../secret.safetensors"})),
    base=SHARDED,
)
damaged(
    "index_points_to_an_absolute_path",
    "shard '/etc/passwd' lies outside",
    index(lambda m: m.update({FIRST: "/etc/passwd"})),
    base=SHARDED,
)
damaged(
    "shard_missing",
    "'model-00002-of-00003.safetensors' is missing",
    remove("model-00002-of-00003.safetensors"),
    base=SHARDED,
)
damaged(
    "index_names_a_tensor_that_is_not_there",
    "tensor 'model.extra' is not in 'model-00001-of-00003.safetensors'",
    index(lambda m: m.update({"model.extra": "model-00001-of-00003.safetensors"})),
    base=SHARDED,
)
damaged(
    "index_without_map", "it has no weight_map", write("model.safetensors.index.json", "{}"), base=SHARDED
)


class Exploit:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def torch_zip(pickled: Callable[[Path], bytes]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        with zipfile.ZipFile(checkpoint / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickled(checkpoint))

    return damage


damaged(
    "pickle_with_code",
    "refused to read its pickle: it refers to 'io.open', which describes no tensor",
    torch_zip(lambda c: pickle.dumps({"w": Exploit(c.parent / "executed")})),
    "torch.save(model.state_dict(), FILE)",
)
damaged("pickle_damaged", "damaged pickle", torch_zip(lambda c: b"\x80\x02}q\x00("))
damaged(
    "pickle_of_no_tensors",
    "its pickle holds no dictionary of tensors",
    torch_zip(lambda c: pickle.dumps([1])),
)


def legacy(checkpoint: Path) -> None:
    tensors = read_tensors(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    torch.save(tensors, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=False)


damaged("pickle_of_the_legacy_format", "this is torch's legacy format", legacy, "torch.save(torch.load(FILE")


def truncated_bin(checkpoint: Path) -> None:
    torch.save(read_tensors(checkpoint), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    cut("pytorch_model.bin", 0.5)(checkpoint)


damaged("bin_truncated", "damaged archive", truncated_bin)

# config.json and generation_config.json.
damaged("config_missing", "'config.json' is missing", remove("config.json"))
damaged("config_no_json", "not valid JSON", write("config.json", "model_type: llava_qwen2\n"))
damaged("config_array", "expected a JSON object, found list", write("config.json", "[]"))
damaged("config_not_utf8", "not valid JSON", write("config.json", b'{"model_type": "\xff\xfe"}'))
damaged("config_deep", "not valid JSON", write("config.json", "[" * 100_000))


def without_tower(folder: Path) -> None:
    """The language model alone."""
    edit_tensors(folder, remove=[name for name in read_tensors(folder) if "vision_tower" in name])


damaged(
    "model_type_unknown",
    "model_type is 'llava'; supported: 'llava_qwen2', 'fast_vlm'",
    lambda c: (config(model_type="llava")(c), without_tower(c)),
    "give a FastVLM checkpoint",
)
damaged(
    "model_type_missing",
    "model_type is null; supported:",
    lambda c: (edit_json(c / "config.json", remove=["model_type"]), without_tower(c)),
)
damaged("heads_zero", "num_attention_heads is 0, expected a positive integer", config(num_attention_heads=0))
damaged(
    "heads_text", "num_attention_heads is 'four', expected a positive", config(num_attention_heads="four")
)
damaged(
    "heads_missing",
    "num_attention_heads is null, expected a positive integer",
    lambda c: edit_json(c / "config.json", remove=["num_attention_heads"]),
)
damaged("heads_do_not_fit", "num_attention_heads 5 does not fit", config(num_attention_heads=5))
damaged(
    "rope_yarn",
    "rope_scaling is 'yarn'; supported: 'default'",
    config(rope_scaling={"type": "yarn", "factor": 4}),
)
damaged("rope_theta_zero", "rope_theta is 0, expected a positive number", config(rope_theta=0))
damaged("norm_epsilon_text", "rms_norm_eps is 'small', expected", config(rms_norm_eps="small"))
damaged("activation_unknown", "hidden_act is 'relu'; supported: 'silu'", config(hidden_act="relu"))
damaged(
    "sliding_window",
    "use_sliding_window is true, and its window of 9 tokens is shorter",
    config(use_sliding_window=True, sliding_window=9, max_window_layers=0),
)
damaged("projector_unknown", "mm_projector_type is 'linear'", config(mm_projector_type="linear"))
damaged(
    "image_size_not_stated", "the image size is not stated", config(mm_vision_tower="mobileclip_l"),
    "set mm_vision_tower to 'mobileclip_l_SIZE'",
)  # fmt: skip
damaged("image_size_odd", "image size 300 is no multiple of 64", config(mm_vision_tower="mobileclip_l_300"))
damaged(
    "end_token_out_of_range",
    "eos_token_id is [151645], expected ids below 512",
    lambda c: edit_json(c / "generation_config.json", {"eos_token_id": [151645]}),
)
damaged(
    "end_token_text",
    "eos_token_id is '<|im_end|>', expected ids below 512",
    lambda c: edit_json(c / "generation_config.json", {"eos_token_id": "<|im_end|>"}),
)
damaged("generation_config_no_json", "not valid JSON", write("generation_config.json", "{,}"))
damaged(
    "head_size_of_8",
    "the decoder's head size is 8; ONNX Runtime's GroupQueryAttention",
    config(num_attention_heads=8),
    "answers from the checkpoint itself",
)

# The tokenizer.
damaged(
    "vocabulary_missing", "'vocab.json' is missing", remove("vocab.json"), "tokenizer.json, or vocab.json"
)
damaged("merges_missing", "'merges.txt' is missing", remove("merges.txt"), "tokenizer.json, or vocab.json")
damaged(
    "merges_malformed", "line 2 is no merge of two known tokens", write("merges.txt", "#version: 1\nab\n")
)
damaged("merges_not_utf8", "cannot read", write("merges.txt", b"#version: 1\n\xff\xfe \xff\n"))
damaged("vocabulary_not_utf8", "not valid JSON", write("vocab.json", b'{"\xff": 0}'))
damaged("vocabulary_of_texts", "it must map tokens to ids", write("vocab.json", '{"a": "b"}'))
damaged(
    "added_token_out_of_place",
    "should have id 430 but follows the vocabulary as 429",
    lambda c: (
        edit_json(c / "added_tokens.json", {"<|endoftext|>": 440}),
        edit_json(c / "tokenizer_config.json", remove=["added_tokens_decoder"]),
    ),
)
damaged(
    "prompt_tokens_missing",
    "the tokenizer has no '<|im_end|>'",
    lambda c: (
        remove("added_tokens.json")(c),
        edit_json(c / "tokenizer_config.json", remove=["added_tokens_decoder"]),
    ),
)
damaged("tokenizer_json_malformed", "not a tokenizer.json", write("tokenizer.json", "{}"), base=HF)
damaged(
    "tokenizer_of_a_larger_model",
    "the embedding table has 300 rows, but token ids go up to",
    tensor(lambda w: w[:300], FIRST),
)


# Paths that are no checkpoint.
@case("there is no such checkpoint", "give the folder that holds config.json")
def checkpoint_missing(place):
    return place.export(place.folder / "none")


@case("'config.json' is missing")
def checkpoint_empty(place):
    (place.folder / "empty").mkdir()
    return place.export(place.folder / "empty")


@case("a checkpoint is a folder, this is a file", "give the folder that holds config.json")
def checkpoint_is_a_file(place):
    return place.export(place.checkpoint() / "model.safetensors")


@case("this is a bundle, not a checkpoint", "give the checkpoint it was exported from")
def checkpoint_is_a_bundle(place):
    return place.export(place.bundle())


# Adapters.
def adapter(place: Place, tensors: dict[str, torch.Tensor], **settings: object) -> tuple[object, ...]:
    folder = place.folder / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8} | settings))
    if tensors:
        save_file(tensors, folder / "adapter_model.safetensors")
    return place.export(place.checkpoint(), "--adapter", folder)


def low_rank(module: str, rows: int = 176, ranks: tuple[int, int] = (4, 4)) -> dict[str, torch.Tensor]:
    name = f"base_model.model.model.layers.0.{module}"
    return {
        f"{name}.lora_A.weight": torch.ones(ranks[0], 64),
        f"{name}.lora_B.weight": torch.ones(rows, ranks[1]),
    }


@case("there is no such adapter", "the folder that holds adapter_config.json")
def adapter_missing(place):
    return place.export(place.checkpoint(), "--adapter", place.folder / "none")


@case("neither adapter_model.safetensors nor adapter_model.bin is here")
def adapter_without_weights(place):
    return adapter(place, {})


@case("have different ranks")
def adapter_of_two_ranks(place):
    return adapter(place, low_rank("mlp.gate_proj", ranks=(4, 8)))


@case("which the checkpoint does not have", "was it trained on another checkpoint")
def adapter_of_another_model(place):
    return adapter(place, low_rank("mlp.fc1"))


@case("has shape [99, 64], the checkpoint's tensor [176, 64]", "use the checkpoint that the adapter was")
def adapter_of_another_shape(place):
    return adapter(place, low_rank("mlp.gate_proj", rows=99))


@case("use_dora is set; only plain LoRA can be merged here", "merge_and_unload()")
def adapter_of_another_kind(place):
    return adapter(place, low_rank("mlp.gate_proj"), use_dora=True)


@case("an adapter can only be merged into a checkpoint", "export with --adapter")
def adapter_for_a_bundle(place):
    return ("run", place.bundle(), "Hi", "--adapter", place.folder)


# Images.
def run(place: Place, *inputs: object) -> tuple[object, ...]:
    return ("run", place.fp32_bundle, *inputs)


@case("there is no such image")
def image_missing(place):
    return run(place, place.folder / "none.png", "What?")


@case("not an image, or of a format that is not supported")
def image_is_text(place):
    return run(place, place.file("a.png", "no picture"), "What?")


@case("not an image, or of a format that is not supported")
def image_empty(place):
    return run(place, place.file("a.png", b""), "What?")


@case("the image cannot be decoded")
def image_truncated(place):
    return run(place, place.file("a.png", IMAGE.read_bytes()[:900]), "What?")


@case("the image cannot be decoded")
def image_is_a_folder(place):
    return run(place, place.folder, "What?")


@case("the image is absurdly large")
def image_is_a_bomb(place):
    """60,000 x 60,000 pixels in a few bytes: the header alone must be enough."""
    content = bytearray(IMAGE.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return run(place, place.file("a.png", bytes(content)), "What?")


@case("the image is absurdly large: 17000 x 8 pixels")
def image_too_long(place):
    Image.new("RGB", (17_000, 8)).save(place.folder / "a.png")
    return run(place, place.folder / "a.png", "What?")


@case("the image cannot be decoded")
def image_name_too_long(place):
    return run(place, "x" * 300 + ".png", "What?")


# Prompts.
@case("the last argument is a file, not a question", 'add "QUESTION"')
def question_missing(place):
    return run(place, IMAGE)


@case("exceed the context of 2048 tokens", "shorten the question")
def prompt_too_long(place):
    return run(place, "How many circles are there? " * 500)


@case("an answer of up to 5000 exceed the context of 2048 tokens", "lower --max-new-tokens")
def answer_too_long(place):
    return run(place, "Hi", "--max-new-tokens", 5000)


@case("an answer of up to 5000 exceed the context of 2048 tokens", "lower --max-new-tokens")
def answer_of_a_checkpoint_too_long(place):
    return ("run", CHECKPOINT, "Hi", "--max-new-tokens", 5000)


@case("--target chooses among a bundle's targets, and this is not a bundle", "leave it out")
def target_for_a_checkpoint(place):
    return ("run", CHECKPOINT, "Hi", "--target", "onnx")


@case("the bundle has no target 'tflite'", "it has onnx")
def target_not_in_the_bundle(place):
    return run(place, "Hi", "--target", "tflite")


@case("there is no such checkpoint")
def model_missing(place):
    return ("run", place.folder / "none", "Hi")


# Bundles.
def bundle_case(
    name: str, message: str, damage: Callable[[Path], object], hint: str | None = None, command: str = "run"
) -> None:
    def prepare(place: Place) -> tuple[object, ...]:
        bundle = place.bundle()
        damage(bundle)
        rest: dict[str, tuple[object, ...]] = {
            "run": ("Hi",),
            "verify": ("--reference", CHECKPOINT, "--images", IMAGE.parent),
            "bench": ("--trials", "1"),
        }
        return (command, bundle, *rest[command])

    CASES[name] = (prepare, message, hint)


bundle_case(
    "manifest_corrupt", "not valid JSON", cut("fastvlm_manifest.json", 0.5), "export the bundle again"
)
bundle_case(
    "manifest_of_another_tool", "not a manifest of fastvlm-convert", write("fastvlm_manifest.json", "{}")
)
bundle_case(
    "manifest_of_another_version", "manifest version 7; this tool reads 2",
    lambda b: edit_manifest(b, lambda m: m.update(schema_version=7)), "export the bundle again",
)  # fmt: skip
bundle_case(
    "manifest_of_wrong_types", "malformed manifest: contract.image_size is 'big', expected an integer",
    lambda b: edit_manifest(b, lambda m: m["contract"].update(image_size="big")),
)  # fmt: skip
bundle_case(
    "manifest_with_an_absurd_context", "malformed manifest: contract.context_length is 1099511627776",
    lambda b: edit_manifest(b, lambda m: m["contract"].update(context_length=1 << 40)),
)  # fmt: skip
bundle_case(
    "manifest_reaches_outside", "file '../../etc/passwd' lies outside the bundle",
    lambda b: edit_manifest(b, lambda m: m["files"].update({"../../etc/passwd": m["files"]["config.json"]})),
)  # fmt: skip
bundle_case("bundle_file_missing", "'tokenizer.json' is missing", remove("tokenizer.json"), "copy the bundle")
bundle_case(
    "bundle_file_of_another_size", "bytes, the manifest says", cut("onnx/vision_encoder.onnx_data", 0.5),
    "copy the bundle again", "verify",
)  # fmt: skip
bundle_case(
    "graph_damaged", "ONNX Runtime refuses the graph",
    lambda b: write("onnx/embed_tokens.onnx", b"\xff" * (b / "onnx/embed_tokens.onnx").stat().st_size)(b),
    "`fastvlm-convert verify` tells whether files were changed",
)  # fmt: skip
bundle_case(
    "bundle_tokenizer_damaged", "not valid JSON",
    lambda b: write("tokenizer.json", b" " * (b / "tokenizer.json").stat().st_size)(b),
)  # fmt: skip
bundle_case(
    "bench_of_no_bundle",
    "not a bundle: it has no fastvlm_manifest.json",
    remove("fastvlm_manifest.json"),
    "export",
    "bench",
)


@case("not a bundle: it has no fastvlm_manifest.json", "fastvlm-convert export")
def verify_of_a_checkpoint(place):
    return ("verify", CHECKPOINT, "--reference", CHECKPOINT)


@case("there is no such checkpoint")
def reference_missing(place):
    return ("verify", place.fp32_bundle, "--reference", place.folder / "none")


@case("the reference is another model: it gives [16, ", "the bundle was made from")
def reference_of_another_model(place):
    edit_json(place.checkpoint(SHARDED) / "config.json", {"num_attention_heads": 7})
    return ("verify", place.fp32_bundle, "--reference", place.checkpoint(SHARDED), "--images", IMAGE.parent)


@case("there is no such folder of images")
def pictures_missing(place):
    return ("verify", place.fp32_bundle, "--reference", CHECKPOINT, "--images", place.folder / "none")


@case("no images here (.png, .jpg")
def pictures_empty(place):
    return ("verify", place.fp32_bundle, "--reference", CHECKPOINT, "--images", place.folder)


@case("expected a list, each entry an object with 'image', 'question'")
def picture_listing_malformed(place):
    place.file("questions.json", '{"a.png": "What?"}')
    return ("verify", place.fp32_bundle, "--reference", CHECKPOINT, "--images", place.folder)


# Outputs.
@case("the output exists", "add --overwrite to replace it")
def output_exists(place):
    (place.folder / "here").mkdir()
    return ("export", CHECKPOINT, *ONNX, "-o", place.folder / "here")


@case("the output is a link", "give the folder itself")
def output_is_a_link(place):
    (place.folder / "link").symlink_to(place.folder / "elsewhere")
    return ("export", CHECKPOINT, *ONNX, "-o", place.folder / "link")


@case("cannot write here: this is no folder")
def output_below_a_file(place):
    return ("export", CHECKPOINT, *ONNX, "-o", place.file("file", "") / "deep" / "bundle")


@case("cannot write here: ")
def output_not_writable(place):
    return ("export", CHECKPOINT, *ONNX, "-o", "/proc/bundle")  # even root cannot write there


@case("cannot write here: File name too long")
def output_name_too_long(place):
    return ("export", CHECKPOINT, *ONNX, "-o", place.folder / ("x" * 300))


@case("the output holds an input or lies inside one", "choose another folder")
def output_inside_the_checkpoint(place):
    return ("export", place.checkpoint(), *ONNX, "-o", place.checkpoint() / "onnx")


@case("the output is no bundle of this tool", "delete it yourself, or choose another folder")
def overwriting_what_is_no_bundle(place):
    (place.folder / "photos").mkdir()
    return ("export", CHECKPOINT, *ONNX, "-o", place.folder / "photos", "--overwrite")


# Recipes and targets.
def with_recipe(place: Place, recipe_: object, target: str = "onnx") -> tuple[object, ...]:
    return ("export", place.checkpoint(), "--target", target, "--recipe", recipe_, "-o", place.output)


def changed_recipe(place: Place, change: Callable[[dict], object], base: str = "fp32") -> Path:
    value = yaml.safe_load(shipped_recipes()[base].read_text())
    change(value)
    return place.file("mine.yaml", yaml.safe_dump(value))


@case("unknown recipe 'int3'", "did you mean 'int4' or 'int8'? shipped recipes: ")
def recipe_unknown(place):
    return with_recipe(place, "int3")


@case("there is no such recipe")
def recipe_missing(place):
    return with_recipe(place, place.folder / "none.yaml")


@case("not valid YAML")
def recipe_no_yaml(place):
    return with_recipe(place, place.file("mine.yaml", "name: [\n"))


@case("unknown setting vision.precision", "allowed in vision: storage, compute")
def recipe_with_an_unknown_key(place):
    return with_recipe(place, changed_recipe(place, lambda r: r["vision"].update(precision=16)))


@case("common.image_size is 500")
def recipe_with_an_impossible_size(place):
    return with_recipe(place, changed_recipe(place, lambda r: r["common"].update(image_size=500)))


@case("one image of 1536 pixels takes 576 tokens, the context has 128", "raise common.max_context_length")
def recipe_whose_image_fills_the_context(place):
    settings = {"image_size": 1536, "max_context_length": 128}
    return with_recipe(place, changed_recipe(place, lambda r: r["common"].update(settings)))


@case("unknown target 'tflite'", "targets: onnx")
def target_unknown(place):
    return with_recipe(place, "fp32", "tflite")


@case("weight 'l0_gate_weight' reaches 1e+05, beyond float16's 65504", "store that component as float32")
def weight_beyond_float16(place):
    tensor(spoiled(1e5))(place.checkpoint())
    return with_recipe(place, "fp16")


# Hostile files: what is no file, what Python cannot build, what would take all memory.
def swapped(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Put something else under the name of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "it is a pipe, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
    "folder": (lambda path: path.mkdir(), "it is a folder, not a file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "it is a link to nowhere, which is missing"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "huge": (lambda path: path.open("wb").truncate(1 << 40), "it has 1099511627776 bytes, at most"),
}
for _kind, (_make, _message) in NO_FILES.items():
    for _file in ("config.json", "vocab.json", "merges.txt", "generation_config.json", "LICENSE"):
        damaged(f"{_file}_is_a_{_kind}", _message, swapped(_file, _make))
    if _kind != "huge":
        damaged(f"weights_are_a_{_kind}", _message, swapped("model.safetensors", _make))
damaged("weights_are_huge", "not a safetensors file", swapped("model.safetensors", NO_FILES["huge"][0]))
damaged(
    "pickle_that_asks_for_memory",
    "damaged pickle",
    torch_zip(lambda c: b"\x80\x05\x96" + struct.pack("<Q", 5 << 30) + b"."),
)
damaged(
    "pickle_that_hashes_for_ever",
    "it has the key",
    torch_zip(lambda c: b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"Ns."),
    "torch.save(model.state_dict(), FILE)",
)
damaged("config_key_twice", "the key 'a' stands twice", write("config.json", '{"a": 1, "a": 2}'))
damaged("vocabulary_token_twice", "stands twice in one object", write("vocab.json", '{"a": 0, "a": 1}'))
damaged(
    "config_digits", "it holds a number of 5000 digits", write("config.json", '{"a": ' + "9" * 5000 + "}")
)
damaged(
    "header_starts_before_the_file",
    "tensor 'w' starts at byte -4; the header is damaged",
    header(w={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}),
    "download",
)
damaged(
    "header_with_a_long_name",
    "has dtype F4; supported are F64",
    header(**{"w" * 100_000: {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}),
)


def recipe_case(name: str, message: str, text: str) -> None:
    """Register a recipe file; %s stands for a recipe that is good."""

    def prepare(place: Place) -> tuple[object, ...]:
        good = shipped_recipes()["fp32"].read_text()
        return with_recipe(place, place.file("mine.yaml", text.replace("%s", good)))

    hint = "allowed in the recipe" if "unknown" in message else "recipes NAME > mine.yaml"
    CASES[name] = (prepare, message, hint)


recipe_case("recipe_key_twice", "the key 'name' stands twice, line", "name: a\n%s")
recipe_case("recipe_no_integer", "'0x_' is no integer, line 1, column 7", "name: 0x_\n")
recipe_case("recipe_tagged", "'x' is no integer", "name: !!int x\n")
recipe_case("recipe_digits", "a number of 5000 digits", f"name: {'1' * 5000}\n")
recipe_case("recipe_date", "unknown setting 2001-99-99", "2001-99-99: 1\n%s")
recipe_case("recipe_null", "the recipe is null, expected settings", "# nothing\n")
recipe_case("recipe_surrogate", "unknown setting \\ud800", '"\\uD800": 1\n%s')
recipe_case("recipe_merge_bomb", "unknown setting a0", "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9 if n else ['{k: 1}'])}]}}\n" for n in range(12)
) + "%s")  # fmt: skip


@case("gates.quantizer_max_kl_nats is nan, expected 0 to 100")
def recipe_with_a_gate_that_nothing_fails(place):
    return with_recipe(
        place, changed_recipe(place, lambda r: r["gates"].update(quantizer_max_kl_nats=float("nan")))
    )


@case("expected a number", "recipes NAME")
def recipe_number_beyond_floats(place):
    return with_recipe(place, changed_recipe(place, lambda r: r["gates"].update(min_sqnr_db=10**399)))


@case("there is no such recipe", "the tool ships one: --recipe fp32")
def recipe_that_ships_under_another_name(place):
    return with_recipe(place, place.folder / "fp32.yaml")


for _output in ("", ".", "/", "a/.."):
    for _flag in ((), ("--overwrite",)):
        CASES[f"output_named_{_output!r}{len(_flag)}"] = (
            lambda place, output=_output, flag=_flag: ("export", CHECKPOINT, *ONNX, "-o", output, *flag),
            "the output",
            None,
        )


@case("the output is a pipe, not a folder", "choose another name")
def output_is_a_pipe(place):
    os.mkfifo(place.folder / "pipe")
    return ("export", CHECKPOINT, *ONNX, "-o", place.folder / "pipe")


@case("the output is a link", "give the folder itself")
def output_is_a_loop(place):
    (place.folder / "loop").symlink_to("loop")
    return ("export", CHECKPOINT, *ONNX, "-o", place.folder / "loop", "--overwrite")


@case("cannot write here: ", "choose another folder")
def output_below_a_loop(place):
    (place.folder / "loop").symlink_to("loop")
    return ("export", CHECKPOINT, *ONNX, "-o", place.folder / "loop" / "bundle")


@case("the text holds half of a character", "the encoding")
def question_of_half_a_character(place):
    return run(place, IMAGE, "What is \ud800?")


@case("temperature is inf, expected a finite number")
def temperature_infinite(place):
    return run(place, IMAGE, "What?", "--temperature", "inf")


@case("the image cannot be decoded: it is a pipe, not a file")
def image_is_a_pipe(place):
    os.mkfifo(place.folder / "a.png")
    return run(place, place.folder / "a.png", "What?")


@case("a bundle is a folder, this is a file", "give the folder that `export` made")
def bundle_is_a_file(place):
    return ("verify", place.file("bundle", ""), "--reference", CHECKPOINT)


@case("there is no such bundle", "fastvlm-convert export")
def bundle_missing(place):
    return ("verify", place.folder / "none", "--reference", CHECKPOINT)


bundle_case(
    "manifest_without_artifacts", "the manifest lists no artifact",
    lambda b: edit_manifest(b, lambda m: m.update(artifacts=[])), None, "verify",
)  # fmt: skip
bundle_case(
    "manifest_that_renames_an_input", "the inputs of onnx vision are zzz; expected pixel_values",
    lambda b: edit_manifest(b, lambda m: m["artifacts"][0]["inputs"][0].update(name="zzz")),
)  # fmt: skip
bundle_case(
    "manifest_with_a_surrogate", "malformed manifest: the inputs of onnx ",
    lambda b: edit_manifest(b, lambda m: m["artifacts"][2]["inputs"][1].update(dtype="\ud800")),
)  # fmt: skip
bundle_case("manifest_is_a_pipe", "it is a pipe", swapped("fastvlm_manifest.json", os.mkfifo), None, "verify")


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("name", CASES)
def test_bad_input(cli: Cli, fp32_bundle: Path, tmp_path: Path, name: str, as_json: bool) -> None:
    prepare, message, hint = CASES[name]
    place = Place(tmp_path, fp32_bundle)
    argv = prepare(place)
    before = tree(tmp_path)
    result = cli(*argv, *["--json"] * as_json)

    assert result.code == 2
    lines = result.err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert [line.partition(" ")[0] for line in lines[1:]] == ["hint:"]
    assert len(lines[0]) < 300 + len("error: ") + len(str(tmp_path)) + 100
    assert not re.search(r"\b(None|NoneType|dict|list\[|str|ValueError|KeyError|True|False)\b", lines[0])
    if hint is not None:
        assert hint in lines[1]
    if as_json:
        document = result.document
        assert (document["command"], document["status"]) == (argv[0], "error")
        assert lines[0] == f"error: {document['error']['message']}"
        assert set(document["error"]) == {"code", "message", "where", "hint"}
        assert document["error"]["code"] in CODES
    else:
        assert result.out == ""
    assert tree(tmp_path) == before  # no output, no partial output, no new folder


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 100


def test_the_hostile_pickle_would_have_worked(tmp_path: Path) -> None:
    """Else the case above would prove nothing."""
    pickle.loads(pickle.dumps(Exploit(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").is_file()


def test_the_unchanged_inputs_are_good(cli: Cli, fp32_bundle: Path, tmp_path: Path) -> None:
    """Each case breaks one thing; without that the same commands succeed."""
    place = Place(tmp_path, fp32_bundle)
    assert cli(*place.export(place.checkpoint())).code == 0
    shutil.rmtree(place.output)
    assert cli(*adapter(place, low_rank("mlp.gate_proj"))).code == 0
    assert cli("run", place.bundle(), IMAGE, "What?", "--max-new-tokens", 2).code == 0
    sharded = place.checkpoint(SHARDED)
    edit_json(sharded / "config.json", {"num_attention_heads": 7})
    export_bundle(sharded, tmp_path / "s", recipe())
