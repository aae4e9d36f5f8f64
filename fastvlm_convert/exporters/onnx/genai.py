"""What onnxruntime-genai reads at the root of a bundle."""

from collections.abc import Sequence
from typing import Any, Final

from fastvlm_convert.io_names import (
    ATTENTION_MASK,
    IMAGE_FEATURES,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS,
    MAIN,
    MERGE,
    PIXEL_VALUES,
    past_key,
    past_value,
    present_key,
    present_value,
)
from fastvlm_convert.manifest import Artifact, Contract
from fastvlm_convert.weights.model_config import ModelConfig

CONFIG_FILE: Final = "genai_config.json"
# onnxruntime-genai has no type for FastVLM. This one has its parts and nothing besides: an encoder whose
# features an embedding merges, and a decoder without position ids.
_MODEL_TYPE: Final = "phi3v"


def genai_config(
    config: ModelConfig, contract: Contract, pad_token_id: int, artifacts: Sequence[Artifact]
) -> dict[str, Any]:
    """The content of genai_config.json.

    Args:
        config: Dimensions.
        contract: What the bundle promises.
        pad_token_id: Id that fills up shorter sequences.
        artifacts: Those of the ONNX target.
    """
    graphs = {(a.component, a.function): a.files[0] for a in artifacts}
    decoder = config.decoder
    return {
        "model": {
            "type": _MODEL_TYPE,
            "bos_token_id": pad_token_id,
            "eos_token_id": list(contract.eos_token_ids),
            "pad_token_id": pad_token_id,
            "image_token_id": contract.image_token_id,
            "vocab_size": decoder.vocab_size,
            "context_length": contract.context_length,
            "vision": {
                "filename": graphs["vision", MAIN],
                "inputs": {"pixel_values": PIXEL_VALUES},
                "outputs": {"image_features": IMAGE_FEATURES},
            },
            "embedding": {
                "filename": graphs["embed", MERGE],
                "inputs": {"input_ids": INPUT_IDS, "image_features": IMAGE_FEATURES},
                "outputs": {"inputs_embeds": INPUTS_EMBEDS},
            },
            "decoder": {
                "filename": graphs["decoder", MAIN],
                "session_options": {"provider_options": []},
                "hidden_size": decoder.hidden_size,
                "head_size": decoder.head_dim,
                "num_attention_heads": decoder.num_heads,
                "num_key_value_heads": decoder.num_kv_heads,
                "num_hidden_layers": decoder.num_layers,
                "inputs": {
                    "inputs_embeds": INPUTS_EMBEDS,
                    "attention_mask": ATTENTION_MASK,
                    "past_key_names": past_key("%d"),
                    "past_value_names": past_value("%d"),
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": present_key("%d"),
                    "present_value_names": present_value("%d"),
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": contract.context_length,
            "past_present_share_buffer": True,
        },
    }


def genai_files(
    config: ModelConfig, contract: Contract, pad_token_id: int, artifacts: Sequence[Artifact]
) -> dict[str, dict[str, Any]]:
    """JSON documents at the root of a bundle, by file name; arguments as of `genai_config`."""
    return {CONFIG_FILE: genai_config(config, contract, pad_token_id, artifacts)}
