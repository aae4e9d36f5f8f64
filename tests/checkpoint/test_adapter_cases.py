"""Adapters give the answers that PEFT gives (see tests/data/cases/README.md)."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.io_names import IMAGE_TOKEN
from fastvlm_convert.model.fastvlm import load_model
from tests.checkpoints import CASES, GOLDEN, HF, golden_cases, golden_checkpoint, golden_model

ADAPTERS = sorted(path.name.removeprefix("adapter-") for path in CASES.glob("adapter-*"))
CASE = next(case for case in golden_cases() if case.name == HF)
BASE = GOLDEN / HF / "checkpoint"


def folder_of(name):
    return CASES / f"adapter-{name}"


def expected_of(name):
    return json.loads((folder_of(name) / "expected_tokens.json").read_text())


@torch.no_grad()
def first_tokens(model, tokenizer, question, count=10):
    """Greedy token ids for the golden's first picture and a question; end tokens are not heeded."""
    prompt = json.loads((GOLDEN / HF / "golden.json").read_text())["cases"][0]["prompt"]
    before, after = prompt.replace(CASE.question, question).split(IMAGE_TOKEN)
    features = model.encode_image(torch.from_numpy(CASE.array("pixel_values")))[0]
    ids = tokenizer.encode(after)
    found = []
    for _ in range(count):
        texts = [torch.tensor(tokenizer.encode(before)), torch.tensor(ids + found)]
        first, last = (model.decoder.embed_tokens(text) for text in texts)
        inputs = torch.cat([first, features, last])[None]
        logits = model.decoder(inputs, model.decoder.new_cache(inputs.shape[1]))
        found.append(int(logits[0, -1].argmax()))
    return found


def question_of(name):
    path = folder_of(name) / "question.txt"
    return path.read_text() if path.is_file() else CASE.question


def adapted_tokens(folder, question=CASE.question):
    checkpoint = open_checkpoint(BASE, folder)
    return first_tokens(load_model(checkpoint.config, checkpoint.weights), checkpoint.tokenizer, question)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_answer_is_pefts(name):
    assert adapted_tokens(folder_of(name), question_of(name)) == expected_of(name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_answer_is_another_than_without(name):
    plain = first_tokens(golden_model(HF), golden_checkpoint(HF).tokenizer, question_of(name))
    assert plain != expected_of(name)


def rewritten(name, folder, rename, **config):
    """The same adapter, its tensors called otherwise."""
    folder.mkdir()
    settings = json.loads((folder_of(name) / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for stored, tensor in load_file(folder_of(name) / "adapter_model.safetensors").items():
        tensors |= rename(stored, tensor)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def with_adapter_name(stored, tensor):
    """As in the state dict of a model that was not saved through PEFT."""
    for part in ("lora_A", "lora_B", "trainable_tokens_delta"):
        stored = stored.replace(f".{part}", f".{part}.default")
    if "lora" not in stored and "trainable_tokens" not in stored:
        module, _, last = stored.rpartition(".")
        module = module.removesuffix(".base_layer")
        original = {f"{module}.original_module.{last}": torch.zeros_like(tensor)}
        return {f"{module}.modules_to_save.default.{last}": tensor, **original}
    return {stored: tensor}


@pytest.mark.parametrize("name", ["embed-only-tied", "trainable-tokens", "conv-1x1"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "base_model.model._orig_mod."])
def test_other_tools_names_are_read(name, prefix, tmp_path):
    bare = prefix.endswith("_orig_mod.") and prefix.startswith("base")

    def rename(stored, tensor):
        renamed = with_adapter_name(stored, tensor)
        return {prefix + (n.removeprefix("base_model.model.") if bare else n): t for n, t in renamed.items()}

    folder = rewritten(name, tmp_path / "adapter", rename, modules_to_save=None)
    assert adapted_tokens(folder) == expected_of(name)


def as_mlx(stored, tensor):
    """mlx-lm's names and orientation, with mlx-vlm's prefix."""
    name = stored.removeprefix("base_model.model.").replace("model.language_model", "language_model.model")
    if ".lora_" not in name:
        return {}
    name = name.removesuffix(".weight")
    return {name.replace("lora_A", "lora_a").replace("lora_B", "lora_b"): tensor.t()}


MLX = {
    "mlx-lm": (as_mlx, {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}),
    "mlx-lm until 2024": (as_mlx, {"lora_parameters": {"rank": 4, "scale": 1.0, "alpha": 8}}),
    "mlx-vlm's first": (
        lambda stored, tensor: {
            n.replace("lora_a", "A").replace("lora_b", "B"): t for n, t in as_mlx(stored, tensor).items()
        },
        {"rank": 4, "alpha": 2.0, "dropout": 0.1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MLX)
def test_mlx_adapters_are_those_of_peft_the_other_way_round(kind, tmp_path):
    rename, config = MLX[kind]
    peft = rewritten("trainable-tokens", tmp_path / "peft", lambda n, t: {n: t} if "lora" in n else {})
    folder = rewritten("trainable-tokens", tmp_path / "mlx", rename)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
    ours, theirs = open_checkpoint(BASE, folder), open_checkpoint(BASE, peft)
    changed = 0
    for name, weight in theirs.weights.items():
        np.testing.assert_array_equal(ours.weights[name].array(), weight.array(), err_msg=name)
        changed += not np.array_equal(weight.array(), golden_checkpoint(HF).weights[name].array())
    assert changed == 2


def test_an_mlx_embedding_that_is_the_head_too_changes_as_both(tmp_path):
    """`LoRAEmbedding.as_linear` adds the same product."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 0.5}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    a, b = torch.randn(512, 2), torch.randn(2, 64)
    tensors = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    save_file(tensors, folder / "adapters.safetensors")
    checkpoint = open_checkpoint(BASE, folder)
    name = "decoder.embed_tokens.weight"
    assert checkpoint.config.decoder.tied
    before = torch.from_numpy(golden_checkpoint(HF).weights[name].array())
    torch.testing.assert_close(torch.from_numpy(checkpoint.weights[name].array()), before + 0.5 * a @ b)
