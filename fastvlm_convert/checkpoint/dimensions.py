"""Read a model's dimensions off its tensors, and report where the config says otherwise."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastvlm_convert.checkpoint.layouts import Layout
from fastvlm_convert.errors import CheckpointError, shown
from fastvlm_convert.io_names import VISION_HEAD_DIM
from fastvlm_convert.weights.file_tensors import FLOAT_DTYPES
from fastvlm_convert.weights.model_config import DecoderConfig, ModelConfig, StageConfig, VisionConfig
from fastvlm_convert.weights.parts import EMBEDDING, HEAD, part_of
from fastvlm_convert.weights.source import WeightSource, same_content

_SET_IT = "set it in config.json as the model was trained"
_FEW = 8  # names listed in a message before the rest is counted
_NUM_STAGES = 5  # the stem halves the image twice, each stage after the first once: 64 pixels a token


@dataclass(frozen=True)
class Disagreement:
    """A config value that the tensors contradict; the tensors win.

    Attributes:
        key: Key in config.json.
        config: What the config says.
        tensors: What the tensors say.
    """

    key: str
    config: Any
    tensors: Any


def infer_config(
    weights: WeightSource, raw: Mapping[str, Any], layout: Layout, image_size: int, path: Path
) -> ModelConfig:
    """The model's dimensions.

    Args:
        weights: Canonical names, train-time branches not yet merged.
        raw: The parsed config.json.
        layout: Whose layout it is.
        image_size: Edge of the square input in pixels.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: A tensor that decides a dimension is missing, or dimensions do not fit together.
    """
    shapes = {name: weight.shape for name, weight in weights.items()}

    def dim(name: str, axis: int) -> int:
        if name not in shapes:
            raise CheckpointError(f"tensor '{name}' is missing", where=path, hint=_missing_hint(name))
        if len(shapes[name]) <= axis or shapes[name][axis] < 1:
            raise CheckpointError(f"tensor '{name}' has shape {list(shapes[name])}", where=path)
        return shapes[name][axis]

    stages = _stages(shapes, dim, path)
    vision = VisionConfig(
        image_size=image_size,
        stem_width=stages[0].width,
        stages=tuple(stages),
        squeeze_width=dim("vision.final.se.reduce.weight", 0),
        output_width=dim("vision.final.se.expand.weight", 0),
    )
    widths = [stage.width for stage in stages] + [vision.output_width]
    for before, after in pairwise(widths):  # each is reached by a convolution with `before` groups
        if after % before:
            raise CheckpointError(
                f"an encoder width of {after} is no multiple of the {before} before it", where=path
            )
    text = text_config(raw, layout)
    return ModelConfig(vision, dim("projector.fc1.weight", 0), _decoder(weights, dim, text, path))


def _missing_hint(name: str) -> str:
    """What to do about a tensor that is not there."""
    if part_of(name) == "vision":
        return "LLaVA saves no encoder that was not trained: give it with --vision-tower FILE"
    if part_of(name) == "projector":
        return "give it with --projector FILE, if it was saved as mm_projector.bin"
    return "is a shard missing, or is it another model?"


def _stages(shapes: Mapping[str, Any], dim: Callable[[str, int], int], path: Path) -> list[StageConfig]:
    count = count_indexed(shapes, "vision.stages", path)
    if not count:
        raise CheckpointError(
            "it has no vision encoder: no tensor of FastViTHD was found",
            where=path,
            hint=_missing_hint("vision.stages"),
        )
    if count != _NUM_STAGES:
        raise CheckpointError(f"its encoder has {count} stages, FastViTHD has {_NUM_STAGES}", where=path)
    stages = []
    for s in range(count):
        block = f"vision.stages.{s}.blocks.0"
        is_attention = f"{block}.attention.qkv.weight" in shapes
        stages.append(
            StageConfig(
                mixer="attention" if is_attention else "conv",
                width=dim(f"{block}.ffn.fc2.weight", 0),
                depth=count_indexed(shapes, f"vision.stages.{s}.blocks", path),
                ffn_width=dim(f"{block}.ffn.fc1.weight", 0),
                has_position=any(n.startswith(f"vision.stages.{s}.position.") for n in shapes),
            )
        )
        if is_attention and stages[-1].width % VISION_HEAD_DIM:
            raise CheckpointError(
                f"encoder stage {s} is {stages[-1].width} wide, no multiple of a head's {VISION_HEAD_DIM}",
                where=path,
            )
    return stages


def _decoder(
    weights: WeightSource, dim: Callable[[str, int], int], text: Mapping[str, Any], path: Path
) -> DecoderConfig:
    embed = f"{EMBEDDING}.weight"
    attention = "decoder.layers.0.self_attn"
    heads = _positive(text, "num_attention_heads", path)
    query, key = dim(f"{attention}.q_proj.weight", 0), dim(f"{attention}.k_proj.weight", 0)
    head_dim, rest = divmod(query, heads)
    if rest or key % head_dim or heads % (key // head_dim) or head_dim % 2:
        raise CheckpointError(
            f"num_attention_heads {heads} does not fit projections of {query} and {key} rows",
            where=path / "config.json",
            hint=_SET_IT,
        )
    hidden, rows = dim(embed, 1), dim(embed, 0)
    head = weights.get(f"{HEAD}.weight")
    return DecoderConfig(
        hidden_size=hidden,
        num_layers=count_indexed(weights, "decoder.layers", path),
        num_heads=heads,
        num_kv_heads=key // head_dim,
        head_dim=head_dim,
        intermediate_size=dim("decoder.layers.0.mlp.gate_proj.weight", 0),
        vocab_size=dim(embed if head is None else f"{HEAD}.weight", 0),
        embed_rows=rows,
        tied=head is None or same_content(head, weights[embed]),
        rms_norm_eps=_number(text, "rms_norm_eps", 1e-6, path),
        rope_theta=_rope_theta(text, path),
        max_position_embeddings=_positive(text, "max_position_embeddings", path, 32768),
    )


def count_indexed(names: Iterable[str], prefix: str, path: Path) -> int:
    """How many N there are in names of the form `prefix.N.*`; they must count from 0.

    Raises:
        CheckpointError: A number is left out.
    """
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d{{1,6}})\.")
    found = {int(match[1]) for name in names if (match := pattern.match(name))}
    gaps = sorted(set(range(len(found))) - found)
    if gaps:
        raise CheckpointError(f"all tensors of '{prefix}.{gaps[0]}' are missing", where=path)
    return len(found)


def check_shapes(weights: WeightSource, expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Every expected weight must be there, as numbers, with the expected number of elements per row.

    Raises:
        CheckpointError: Names the tensors that are missing, or one of another shape or dtype.
    """
    missing = [name for name in expected if name not in weights]
    if missing:
        more = f" and {len(missing) - _FEW} more" if len(missing) > _FEW else ""
        raise CheckpointError(
            f"{len(missing)} tensors are missing: {', '.join(missing[:_FEW])}{more}",
            where=path,
            hint="is a shard missing, or is it a checkpoint of the language model alone?",
        )
    for name, shape in expected.items():
        stored, dtype = weights[name].shape, weights[name].dtype
        # Dimensions of 1 may be left out or added, but rows must stay rows.
        if stored[:1] != shape[:1] or _without_ones(stored) != _without_ones(shape):
            raise CheckpointError(
                f"tensor '{name}' has shape {list(stored)}, expected {list(shape)}", where=path
            )
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"tensor '{name}' is stored as {dtype}; weights must be one of {', '.join(FLOAT_DTYPES)}",
                where=path,
                hint="give the unquantized checkpoint",
            )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def find_disagreements(
    config: ModelConfig, raw: Mapping[str, Any], layout: Layout
) -> tuple[Disagreement, ...]:
    """What config.json says and the tensors contradict."""
    text = text_config(raw, layout)
    decoder, vision = config.decoder, config.vision
    claims: list[tuple[str, Any, Any]] = [
        (key, text.get(key), getattr(decoder, ours))
        for key, ours in (
            ("hidden_size", "hidden_size"), ("num_hidden_layers", "num_layers"),
            ("num_key_value_heads", "num_kv_heads"), ("head_dim", "head_dim"),
            ("intermediate_size", "intermediate_size"), ("vocab_size", "vocab_size"),
        )
    ]  # fmt: skip
    tie = raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    claims.append(("tie_word_embeddings", tie, decoder.tied))
    if layout == "llava_qwen2":
        claims.append(("mm_hidden_size", raw.get("mm_hidden_size"), vision.output_width))
    else:
        described = _object(raw.get("vision_config"))
        arguments = _object(described.get("model_args"))
        depths, widths = [s.depth for s in vision.stages], [s.width for s in vision.stages]
        claims += [
            ("vision_config.hidden_size", described.get("hidden_size"), vision.output_width),
            ("vision_config.model_args.layers", arguments.get("layers"), depths),
            ("vision_config.model_args.embed_dims", arguments.get("embed_dims"), widths),
            ("image_seq_length", raw.get("image_seq_length"), vision.num_image_tokens),
        ]
    return tuple(
        Disagreement(key, said, found) for key, said, found in claims if said is not None and said != found
    )


def check_supported(raw: Mapping[str, Any], layout: Layout, path: Path) -> None:
    """Refuse settings that change what the network computes and that we do not implement.

    Raises:
        CheckpointError: Names the key, its value and the values that are supported.
    """
    text = text_config(raw, layout)
    rope = _object(text.get("rope_scaling")) or _object(text.get("rope_parameters"))
    rules: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("rope_scaling", rope.get("rope_type", rope.get("type", "default")), ("default",)),
        ("mm_projector_type", raw.get("mm_projector_type", "mlp2x_gelu"), ("mlp2x_gelu",)),
        ("mm_patch_merge_type", raw.get("mm_patch_merge_type", "flat"), ("flat",)),
        ("mm_use_im_start_end", raw.get("mm_use_im_start_end", False), (False, None)),
        ("image_aspect_ratio", raw.get("image_aspect_ratio", "pad"), ("pad", "square", None)),
        ("projector_hidden_act", raw.get("projector_hidden_act", "gelu"), ("gelu",)),
    ]
    for key, value, allowed in rules:
        if value not in allowed:
            raise CheckpointError(
                f"{key} is {shown(value)}; supported: "
                f"{', '.join(shown(a) for a in allowed if a is not None)}",
                where=path / "config.json",
                hint="the tool implements FastVLM's own network; give a checkpoint of it",
            )
    _check_window(text, path)


def _check_window(text: Mapping[str, Any], path: Path) -> None:
    """Take a sliding window where transformers' Qwen2 would mask nothing by it.

    Raises:
        CheckpointError: Some layer looks back less far than the context.
    """
    window, context = text.get("sliding_window"), text.get("max_position_embeddings", 32768)
    if text.get("use_sliding_window") in (False, None) or window is None:
        return
    types, first = text.get("layer_types"), text.get("max_window_layers", 28)
    if isinstance(types, list):
        slides = "sliding_attention" in types
    else:
        layers = text.get("num_hidden_layers")
        slides = not (type(first) is int and type(layers) is int and first >= layers)
    if slides and not (type(window) is int and type(context) is int and window >= context):
        raise CheckpointError(
            f"use_sliding_window is true, and its window of {shown(window)} tokens is shorter than the "
            f"context of {shown(context)}; supported: windows as long as the context",
            where=path / "config.json",
            hint="if no prompt is longer than the window, set max_position_embeddings to it in a copy",
        )


def text_config(raw: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
    """Where the decoder's settings stand."""
    return _object(raw.get("text_config")) or raw if layout == "fast_vlm" else raw


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _rope_theta(text: Mapping[str, Any], path: Path) -> float:
    parameters = _object(text.get("rope_parameters"))
    return _number(parameters if "rope_theta" in parameters else text, "rope_theta", 1e6, path)


def _positive(values: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = values.get(key, default)
    if type(value) is not int or not 0 < value < 1 << 24:
        what = f"{key} is {shown(value)}, expected a positive integer"
        raise CheckpointError(what, where=path / "config.json", hint=_SET_IT)
    return value


def _number(values: Mapping[str, Any], key: str, default: float, path: Path) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        what = f"{key} is {shown(value)}, expected a positive number"
        raise CheckpointError(what, where=path / "config.json", hint=_SET_IT)
    return float(value)
