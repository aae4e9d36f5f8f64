"""Adapters as PEFT and LLaVA's training store them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


def low_rank(module: str, out: int, width: int, rank: int, seed: int = 0) -> Tensors:
    """The two halves of an adapter as PEFT stores them."""
    rng = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, width, generator=rng),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(out, rank, generator=rng),
    }


def write_adapter(
    folder: Path, tensors: Tensors, as_bin: bool = False, whole: Tensors | None = None, **config: Any
) -> Path:
    """A PEFT folder; `whole` becomes LLaVA's file of tensors that were trained whole."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if as_bin:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    if whole is not None:
        torch.save(whole, folder / "non_lora_trainables.bin")
    return folder


def wide_adapter(folder: Path, base: Tensors, rank: int = 24) -> Path:
    """An adapter of the embedding and of every projection and 1x1 convolution of a checkpoint.

    Args:
        folder: Where to make it.
        base: The checkpoint's tensors by their stored names.
        rank: Columns of each adapter; large enough that libraries choose among kernels.
    """
    rng = torch.Generator().manual_seed(1)

    def small(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) / 30

    tensors = {}
    for name, tensor in sorted(base.items()):
        module = PREFIX + name.removesuffix(".weight")
        if name.endswith("embed_tokens.weight"):
            tensors[f"{module}.lora_embedding_A"] = small(rank, len(tensor))
            tensors[f"{module}.lora_embedding_B"] = small(tensor.shape[1], rank)
        elif name.endswith((".q_proj.weight", ".down_proj.weight", ".fc1.weight", ".fc2.weight")):
            tensors[f"{module}.lora_A.weight"] = small(rank, *tensor.shape[1:])
            tensors[f"{module}.lora_B.weight"] = small(len(tensor), rank, *[1] * (tensor.ndim - 2))
    return write_adapter(folder, tensors, r=rank, lora_alpha=2 * rank)
