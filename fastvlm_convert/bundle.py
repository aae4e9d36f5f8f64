"""What is shipped beside the artifacts, and writing a bundle whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.checkpoint.tokenizer import TextTokenizer, tokenizer_json
from fastvlm_convert.contract import IMAGE_TOKEN, PATCH_SIZE, SYSTEM_PROMPT, Component
from fastvlm_convert.errors import OutputError
from fastvlm_convert.manifest import Artifact, Contract, is_bundle
from fastvlm_convert.preprocess import PROMPT_AFTER, PROMPT_BEFORE
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.config import ModelConfig

NO_LICENCE = "not_found"
PROMPT_FORMAT = f"{PROMPT_BEFORE}{IMAGE_TOKEN}\n{{question}}{PROMPT_AFTER}"

# Accepts content as a string, and as a list of parts as transformers.js and transformers pass it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\\n{SYSTEM_PROMPT}<|im_end|>\\n' }}}}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{{{{ '{IMAGE_TOKEN}\\n' }}}}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_MAX_NEW_TOKENS = 256  # as Apple's predict.py; without it transformers.js stops after one token


@contextmanager
def new_folder(output: Path, overwrite: bool, protected: list[Path]) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends without an error.

    Args:
        output: The folder to make.
        overwrite: Whether an existing bundle may be replaced; it stays until the new one is complete.
        protected: Input folders; they are not written to, nor is a folder that holds one replaced.

    Raises:
        OutputError: `output` exists and may not be replaced, or its parent cannot be written to.
    """
    try:
        _check_output(output, overwrite, protected)
        new_parents = [parent for parent in output.parents if not parent.exists()]
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError("cannot write here: this is no folder", where=error.filename) from error
    except OSError as error:
        raise OutputError(f"cannot write here: {error.strerror}", where=output.parent) from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        _replace(partial, output, overwrite)
    except OSError as error:
        raise OutputError(f"cannot write: {error.strerror}", where=error.filename or output) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # they hold the output now, or something else
            for parent in new_parents:
                parent.rmdir()


def _check_output(output: Path, overwrite: bool, protected: list[Path]) -> None:
    if output.is_symlink():
        raise OutputError("the output is a link", where=output, hint="give the folder itself")
    resolved = output.resolve()
    for path in protected:
        if path.resolve().is_relative_to(resolved) or resolved.is_relative_to(path.resolve()):
            raise OutputError(
                "the output holds an input or lies inside one", where=output, hint="choose another folder"
            )
    if not output.exists():
        return
    if not overwrite:
        raise OutputError("the output exists", where=output, hint="add --overwrite to replace it")
    if not is_bundle(output):
        raise OutputError(
            "the output is no bundle of this tool, so --overwrite does not replace it",
            where=output,
            hint="delete it yourself, or choose another folder",
        )


def _replace(partial: Path, output: Path, overwrite: bool) -> None:
    if not (overwrite and output.exists()):
        partial.rename(output)
        return
    old = partial.with_name(partial.name + ".old")
    output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_side_files(
    folder: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    contract: Contract,
    artifacts: list[Artifact],
    recipe: Recipe,
) -> None:
    """Write tokenizer, preprocessing, generation and model config, and the licence, as clients read them."""
    tokenizer = checkpoint.tokenizer
    (folder / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, contract))
    _write_json(folder / "config.json", _config(config, contract, artifacts, tokenizer))
    _write_json(folder / "generation_config.json", _generation_config(contract, tokenizer))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(contract))
    _write_json(folder / "processor_config.json", _PROCESSOR_CONFIG)
    if checkpoint.licence is not None:
        shutil.copyfile(checkpoint.licence, folder / checkpoint.licence.name)
        (folder / "NOTICE").write_text(_notice(checkpoint.licence, recipe), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(
    config: ModelConfig, contract: Contract, artifacts: list[Artifact], tokenizer: TextTokenizer
) -> dict[str, Any]:
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
        **_transformers_js(artifacts),
    }


def _transformers_js(artifacts: list[Artifact]) -> dict[str, Any]:
    onnx = {a.component: a for a in artifacts if a.target == "onnx"}
    if not onnx:
        return {}
    dtypes = {"float32": "fp32", "float16": "fp16"}
    graphs = {c: Path(a.files[0]).name for c, a in onnx.items()}

    def base(component: Component) -> str:
        return graphs[component].removesuffix(".onnx").removesuffix("_fp16")

    return {
        "transformers.js_config": {
            "dtype": {base(c): dtypes[a.storage] for c, a in onnx.items()},
            # Exactly the data files that exist under a graph's own name: a missing one is an error there.
            "use_external_data_format": {
                graphs[c]: 1 for c, a in onnx.items() if Path(a.files[1]).name == f"{graphs[c]}_data"
            },
            "kv_cache_dtype": {dtypes[onnx["decoder"].storage]: onnx["decoder"].compute},
        }
    }


def _generation_config(contract: Contract, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Greedy. The checkpoint's own would make clients sample with a repetition penalty."""
    return {
        "do_sample": False,
        "max_new_tokens": _MAX_NEW_TOKENS,
        "eos_token_id": list(contract.eos_token_ids),
        "pad_token_id": tokenizer.end_of_text_id,
    }


def _preprocessor_config(contract: Contract) -> dict[str, Any]:
    size = contract.image_size
    is_padded = contract.image_mode == "pad"
    return {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        # Both edges: the longer one fits, and "cropping" the smaller rest pads it with black.
        "size": {"shortest_edge": size, "longest_edge": size} if is_padded else {"shortest_edge": size},
        "resample": 1
        if is_padded
        else 3,  # transformers.js' bicubic has no antialiasing; 1 (Lanczos) is closer
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }


_PROCESSOR_CONFIG = {
    "processor_class": "LlavaProcessor",
    "image_token": IMAGE_TOKEN,
    "patch_size": PATCH_SIZE,
    "num_additional_image_tokens": 0,
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
        "chat_template": CHAT_TEMPLATE,  # here, because transformers.js opens no chat_template.jinja
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": contract.context_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }


def _notice(licence: Path, recipe: Recipe) -> str:
    """What a licence asks of those who pass a derivative on: say what it is and what was changed."""
    text = licence.read_text(encoding="utf-8", errors="replace")
    attribution = (
        "Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model "
        "License Agreement.\n\n"
        if "Apple Machine Learning Research Model" in text
        else ""
    )
    return (
        f"{attribution}This bundle is a derivative of a FastVLM model; its licence is in {licence.name}.\n\n"
        "Modifications: BatchNorm and LayerScale of the image encoder were folded into the weights beside "
        "them, the model was converted to the formats in this bundle, and its weights are stored as "
        f"{recipe.vision.storage} (image encoder, projector), {recipe.embed.storage} (embedding) and "
        f"{recipe.decoder.storage} (decoder), by fastvlm-convert with the recipe '{recipe.name}'.\n"
    )
