"""The files that clients read beside the graphs: config, tokenizer, preprocessing, generation."""

import json
from collections.abc import Mapping
from typing import Any

from fastvlm_convert.checkpoint.tokenizer import TextTokenizer, tokenizer_json
from fastvlm_convert.io_names import IMAGE_TOKEN, PATCH_SIZE
from fastvlm_convert.manifest import Contract
from fastvlm_convert.preprocess import RESAMPLINGS, ImageSettings
from fastvlm_convert.prompt import chat_template
from fastvlm_convert.weights.model_config import ModelConfig

_NO_PATCH = 1_000_000_000  # pixels
_MAX_NEW_TOKENS = 256  # as Apple's predict.py; without it transformers.js stops after one token


def client_files(
    tokenizer: TextTokenizer,
    config: ModelConfig,
    contract: Contract,
    added: Mapping[str, Any],
    documents: Mapping[str, dict[str, Any]],
    in_graph: bool,
) -> dict[str, bytes]:
    """What transformers.js, transformers and onnxruntime-genai read at the root of a bundle, by name.

    Args:
        tokenizer: The checkpoint's.
        config: Dimensions.
        contract: What the bundle promises.
        added: What the targets' own clients look up in config.json besides.
        documents: What they read in files of their own, by name.
        in_graph: Whether a graph prepares pictures, so that clients must not.
    """
    is_padded = contract.image_mode == "pad"
    return {
        **_common_files(tokenizer, contract, in_graph),
        "generation_config.json": _json(_generation_config(contract, tokenizer)),
        "preprocessor_config.json": _json(
            _picture_config() if in_graph else _preprocessor_config(contract.images, is_padded)
        ),
        "config.json": _json({**_config(config, contract, tokenizer), **added}),
        **{name: _json(document) for name, document in documents.items()},
    }


def app_files(
    tokenizer: TextTokenizer, config: ModelConfig, contract: Contract, added: Mapping[str, Any]
) -> dict[str, bytes]:
    """What Apple's app and mlx-vlm read beside the model, by name; the app crops and mlx-vlm pads regardless.

    Args:
        tokenizer: The checkpoint's.
        config: Dimensions.
        contract: What the bundle promises.
        added: What config.json says besides, or instead.
    """
    return {
        **_common_files(tokenizer, contract, in_graph=False),
        "preprocessor_config.json": _json(_preprocessor_config(contract.images, False)),
        "config.json": _json({**_config(config, contract, tokenizer), **added}),
    }


def _common_files(tokenizer: TextTokenizer, contract: Contract, in_graph: bool) -> dict[str, bytes]:
    return {
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": _json(_tokenizer_config(tokenizer, contract)),
        "processor_config.json": _json(_processor_config(contract, in_graph)),
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _config(config: ModelConfig, contract: Contract, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Apple's flat form, the only one that transformers.js and Apple's app read."""
    decoder = config.decoder
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": decoder.max_position_embeddings,
        "mm_hidden_size": config.vision.output_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{contract.image_size}",
        "image_aspect_ratio": "pad" if contract.image_mode == "pad" else "square",
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tied,  # written even if true: clients guess otherwise
        "vocab_size": decoder.vocab_size,
        "bos_token_id": tokenizer.end_of_text_id,
        "eos_token_id": list(contract.eos_token_ids),
        "pad_token_id": tokenizer.end_of_text_id,
        "image_token_index": contract.image_token_id,
    }


def _generation_config(contract: Contract, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Greedy. The checkpoint's own would make clients sample with a repetition penalty."""
    return {
        "do_sample": False,
        "max_new_tokens": _MAX_NEW_TOKENS,
        "eos_token_id": list(contract.eos_token_ids),
        "pad_token_id": tokenizer.end_of_text_id,
    }


def _preprocessor_config(images: ImageSettings, is_padded: bool) -> dict[str, Any]:
    size = images.size
    # transformers.js' bicubic (3) has no antialiasing; its Lanczos (1) comes closer to the original.
    replaced = is_padded and images.resampling == "bicubic"
    resample = RESAMPLINGS.index("lanczos" if replaced else images.resampling)
    return {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        # Both edges: the longer one fits, and "cropping" the smaller rest pads it with black.
        "size": {"shortest_edge": size, "longest_edge": size} if is_padded else {"shortest_edge": size},
        "resample": resample,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": images.rescale_factor,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }


def _picture_config() -> dict[str, Any]:
    """Leaves a picture as it is, in 0..1: the graph does the rest."""
    return {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": False,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }


def _processor_config(contract: Contract, in_graph: bool) -> dict[str, Any]:
    """How clients count image tokens: one a patch of what they send, and some more."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        # No picture has a patch so large, so each becomes the tokens that are added to its patches.
        "patch_size": _NO_PATCH if in_graph else PATCH_SIZE,
        "num_additional_image_tokens": contract.num_image_tokens if in_graph else 0,
        "vision_feature_select_strategy": "full",
    }


def _tokenizer_config(tokenizer: TextTokenizer, contract: Contract) -> dict[str, Any]:
    added = tokenizer.backend.get_added_tokens_decoder()
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for i, token in sorted(added.items())
        },
        "bos_token": None,
        # Here, because transformers.js opens no chat_template.jinja.
        "chat_template": chat_template(contract.conversation),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": contract.context_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
