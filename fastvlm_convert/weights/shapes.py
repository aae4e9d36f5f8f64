"""Every weight a FastVLM has, by canonical name, with its shape."""

from collections.abc import Iterator

from fastvlm_convert.weights.model_config import DecoderConfig, ModelConfig, StageConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]

STEM_KERNELS = (3, 3, 1)
DOWNSAMPLE_KERNELS = (7, 1)


def weight_shapes(config: ModelConfig) -> Shapes:
    """Canonical name -> shape of every weight, before folding."""
    return {
        **_vision_shapes(config.vision),
        **_projector_shapes(config),
        **_decoder_shapes(config.decoder),
    }


def convolutions(vision: VisionConfig) -> Iterator[str]:
    """Names of the encoder's blocks that run as one convolution but may be stored as several branches."""
    yield from (f"vision.stem.{i}" for i in range(3))
    for s, stage in enumerate(vision.stages):
        if s:
            yield from (f"vision.stages.{s}.downsample.{i}" for i in range(2))
        if stage.has_position:
            yield f"vision.stages.{s}.position"
        if stage.mixer == "conv":
            yield from (f"vision.stages.{s}.blocks.{b}.mixer" for b in range(stage.depth))
    yield "vision.final.conv"


def _conv(name: str, out: int, per_group: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out, per_group, kernel, kernel), f"{name}.bias": (out,)}


def _vision_shapes(vision: VisionConfig) -> Shapes:
    stem = vision.stem_width
    shapes: Shapes = {}
    for i, (per_group, kernel) in enumerate(zip((3, 1, stem), STEM_KERNELS, strict=True)):
        shapes |= _conv(f"vision.stem.{i}", stem, per_group, kernel)
    for s, stage in enumerate(vision.stages):
        prefix = f"vision.stages.{s}"
        if s:
            shapes |= _conv(f"{prefix}.downsample.0", stage.width, 1, DOWNSAMPLE_KERNELS[0])
            shapes |= _conv(f"{prefix}.downsample.1", stage.width, stage.width, DOWNSAMPLE_KERNELS[1])
        if stage.has_position:
            shapes |= _conv(f"{prefix}.position", stage.width, 1, 7)
        for b in range(stage.depth):
            shapes |= _block_shapes(f"{prefix}.blocks.{b}", stage)
    width, squeeze = vision.output_width, vision.squeeze_width
    shapes |= _conv("vision.final.conv", width, 1, 3)
    shapes |= _conv("vision.final.se.reduce", squeeze, width, 1)
    return shapes | _conv("vision.final.se.expand", width, squeeze, 1)


def _block_shapes(block: str, stage: StageConfig) -> Shapes:
    width = stage.width
    shapes: Shapes = {f"{block}.ffn.conv.weight": (width, 1, 7, 7), f"{block}.ffn_scale": (width,)}
    for part in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{block}.ffn.bn.{part}"] = (width,)
    shapes |= _conv(f"{block}.ffn.fc1", stage.ffn_width, width, 1)
    shapes |= _conv(f"{block}.ffn.fc2", width, stage.ffn_width, 1)
    if stage.mixer == "conv":
        return shapes | _conv(f"{block}.mixer", width, 1, 3)
    return shapes | {
        f"{block}.norm.weight": (width,),
        f"{block}.norm.bias": (width,),
        f"{block}.attention.qkv.weight": (3 * width, width),
        f"{block}.attention.proj.weight": (width, width),
        f"{block}.attention.proj.bias": (width,),
        f"{block}.attention_scale": (width,),
    }


def _projector_shapes(config: ModelConfig) -> Shapes:
    hidden = config.decoder.hidden_size
    return {
        "projector.fc1.weight": (config.projector_width, config.vision.output_width),
        "projector.fc1.bias": (config.projector_width,),
        "projector.fc2.weight": (hidden, config.projector_width),
        "projector.fc2.bias": (hidden,),
    }


def _decoder_shapes(decoder: DecoderConfig) -> Shapes:
    hidden, mlp = decoder.hidden_size, decoder.intermediate_size
    query, key = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    shapes: Shapes = {"decoder.embed_tokens.weight": (decoder.embed_rows, hidden)}
    for i in range(decoder.num_layers):
        layer = f"decoder.layers.{i}"
        for proj, rows in (("q", query), ("k", key), ("v", key)):
            shapes[f"{layer}.self_attn.{proj}_proj.weight"] = (rows, hidden)
            shapes[f"{layer}.self_attn.{proj}_proj.bias"] = (rows,)
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (hidden, query),
            f"{layer}.mlp.gate_proj.weight": (mlp, hidden),
            f"{layer}.mlp.up_proj.weight": (mlp, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, mlp),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["decoder.norm.weight"] = (hidden,)
    if not decoder.tied:
        shapes["decoder.lm_head.weight"] = (decoder.vocab_size, hidden)
    return shapes
