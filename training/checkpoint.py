"""Write and read checkpoints in the file layout of Apple's FastVLM releases."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from network import Decoder, NetworkConfig, Projector, Vision, fold
from safetensors.torch import load_file, save_file
from text import END, END_OF_TEXT, SPECIAL_TOKENS, START
from tokenizers import Tokenizer
from torch import Tensor, nn

_PREFIXES = {
    "vision": "model.vision_tower.vision_tower.model.",
    "projector": "model.mm_projector.",
    "decoder": "model.",
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class FoldedModel(nn.Module):
    """The network as checkpoints store it: vision, projector and decoder, with their branches merged."""

    def __init__(self, vision: Vision, projector: Projector, decoder: Decoder) -> None:
        """Fold copies of the three parts."""
        super().__init__()
        self.vision = fold(copy.deepcopy(vision))
        self.projector = copy.deepcopy(projector)
        self.decoder = copy.deepcopy(decoder)


def to_apple_names(model: nn.Module) -> dict[str, Tensor]:
    """State of a model with parts `vision`, `projector` and `decoder` under Apple's names."""
    return {
        prefix + name: tensor.contiguous()
        for part, prefix in _PREFIXES.items()
        for name, tensor in getattr(model, part).state_dict().items()
    }


def load_apple_names(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `to_apple_names`, strict."""
    for part, prefix in _PREFIXES.items():
        module = getattr(model, part)
        module.load_state_dict({name: state[prefix + name] for name in module.state_dict()})


def write_checkpoint(folder: Path, model: nn.Module, config: NetworkConfig, tokenizer: Tokenizer) -> None:
    """Write weights (float16), tokenizer and settings of a folded model."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in to_apple_names(model).items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, tokenizer)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    _write_json(folder / "config.json", _config(config, ids))
    generation = {
        "do_sample": False,
        "eos_token_id": [ids[END], ids[END_OF_TEXT]],
        "pad_token_id": ids[END_OF_TEXT],
    }
    _write_json(folder / "generation_config.json", generation)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in float32, under Apple's names."""
    state = load_file(folder / "model.safetensors")
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    words = {token: index for token, index in model["vocab"].items() if token not in ids}
    _write_json(folder / "vocab.json", words, indent=None)
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    _write_json(folder / "added_tokens.json", ids, indent=None)
    special = {
        "additional_special_tokens": [START, END],
        "eos_token": END,
        "pad_token": END_OF_TEXT,
    }
    _write_json(folder / "special_tokens_map.json", special)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": True} for token, index in ids.items()
        },
        **special,
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 8192,
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _config(config: NetworkConfig, ids: dict[str, int]) -> dict[str, object]:
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": ids[END_OF_TEXT],
        "eos_token_id": ids[END],
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": 2048,
        "max_window_layers": config.layers,
        "mm_hidden_size": config.feature_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{config.image_size}",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float16",
        "transformers_version": "4.48.3",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def _write_json(path: Path, content: object, indent: int | None = 2) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def count_parameters(model: nn.Module) -> int:
    """Stored parameters of a folded model."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def round_to_half(model: nn.Module) -> nn.Module:
    """Round all weights to float16 in place, so that accuracy is measured on what is stored."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    return model
