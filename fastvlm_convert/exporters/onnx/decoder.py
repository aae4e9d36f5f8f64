"""Lower the Qwen2 decoder: fused attention with rotary positions inside, fused norms, KV cache in and out."""

from dataclasses import dataclass

import numpy as np

from fastvlm_convert.exporters.onnx.affine import StoredAffine, matmul, store_affine
from fastvlm_convert.exporters.onnx.embed import Table
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.rotary import rotary_tables
from fastvlm_convert.io_names import (
    ATTENTION_MASK,
    BATCH,
    INPUTS_EMBEDS,
    LOGITS,
    PAST_SEQUENCE,
    SEQUENCE,
    TOTAL_SEQUENCE,
    decoder_op,
    past_key,
    past_value,
    present_key,
    present_value,
)
from fastvlm_convert.quantized.weight import (
    AffineSource,
    QuantizedWeight,
    alike,
    float_weight,
    stacked,
)
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.source import Weight


@dataclass(frozen=True)
class _Context:
    """What every layer reads: the cache's fill and the rotary tables."""

    past_length: str
    total_length: str
    cos: str
    sin: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """In the order in which attention reads them."""
        return self.past_length, self.total_length, self.cos, self.sin


def build_decoder(
    graph: Graph, config: DecoderConfig, weights: AffineSource, context_length: int, head: Table
) -> None:
    """Add the whole decoder to a graph.

    The cache may grow with every call or be one buffer bound as past and present: GroupQueryAttention
    writes in place when both are the same memory.

    Args:
        graph: An empty graph.
        config: Dimensions.
        weights: Canonical names.
        context_length: Rows of the rotary tables, so the most positions the graph can run.
        head: Where the head's table lies (see `embed.store_table`), possibly with rows beyond the vocabulary.
    """
    _declare(graph, config)
    embeds = graph.input(INPUTS_EMBEDS, "float32", [BATCH, SEQUENCE, config.hidden_size])
    context = _context(graph, config, context_length)
    x = embeds if graph.compute == "float32" else graph.cast(embeds, graph.compute, "inputs_cast")
    if config.residual_shift:
        scale = graph.constant("residual_scale", np.array(config.residual_scale, graph.compute))
        x = graph.op("Mul", [x, scale], "inputs_scaled")
    skip = ""  # the output of the last block, not yet added to the residual stream x
    for i in range(config.num_layers):
        x, skip = _layer(graph, config, weights, i, x, skip, context)
    # Only the last position is needed, so the head runs on one row instead of the whole prompt.
    x, skip = _last(graph, x, "last_residual"), _last(graph, skip, "last_block")
    normed, _ = _norm(graph, config, float_weight(weights, "decoder.norm.weight"), x, skip, "final_norm")
    logits = LOGITS if graph.compute == "float32" else "lm_head"
    if isinstance(head, StoredAffine):
        matmul(graph, logits, normed, head, config.vocab_size)
    else:
        shape = (config.vocab_size, config.hidden_size)
        matrix = graph.external("lm_head_weight", head, graph.storage, shape)
        if graph.storage != graph.compute:
            matrix = graph.cast(matrix, graph.compute, "lm_head_cast")
        graph.fused("FusedMatMul", [normed, matrix], logits, transB=1)
    if logits != LOGITS:
        graph.cast(logits, "float32", LOGITS)
    graph.output(LOGITS, "float32", [BATCH, 1, config.vocab_size])
    _declare_present(graph, config)


def _declare(graph: Graph, config: DecoderConfig) -> None:
    graph.input(ATTENTION_MASK, "int64", [BATCH, TOTAL_SEQUENCE])
    shape: list[int | str] = [BATCH, config.num_kv_heads, PAST_SEQUENCE, config.head_dim]
    for i in range(config.num_layers):
        graph.input(past_key(i), graph.compute, shape)
        graph.input(past_value(i), graph.compute, shape)


def _declare_present(graph: Graph, config: DecoderConfig) -> None:
    shape: list[int | str] = [BATCH, config.num_kv_heads, TOTAL_SEQUENCE, config.head_dim]
    for i in range(config.num_layers):
        graph.output(present_key(i), graph.compute, shape)
        graph.output(present_value(i), graph.compute, shape)


def _context(graph: Graph, config: DecoderConfig, context_length: int) -> _Context:
    one = graph.constant("one", np.array([1], np.int64))
    graph.op("ReduceSum", [ATTENTION_MASK, one], "mask_sum", keepdims=0)
    graph.op("Sub", ["mask_sum", one], "past_length_int64")
    graph.op("Shape", [ATTENTION_MASK], "mask_shape")
    graph.op("Gather", ["mask_shape", graph.constant("second", np.array(1, np.int64))], "total_length_int64")
    cos, sin = rotary_tables(config, context_length)
    return _Context(
        past_length=graph.cast("past_length_int64", "int32", "past_length"),
        total_length=graph.cast("total_length_int64", "int32", "total_length"),
        cos=_table(graph, "cos_cache", cos),
        sin=_table(graph, "sin_cache", sin),
    )


def _table(graph: Graph, name: str, values: np.ndarray) -> str:
    """A table that is no weight of the model, so it is stored as precisely as it is used."""
    stored = values.astype(graph.compute)
    return graph.external(name, graph.data.append([stored], stored.nbytes), graph.compute, values.shape)


def _layer(
    graph: Graph, config: DecoderConfig, weights: AffineSource, i: int, x: str, skip: str, context: _Context
) -> tuple[str, str]:
    """One layer; returns the residual stream and the MLP's output that is still to be added to it."""
    layer = f"decoder.layers.{i}"

    def op(part: str) -> str:
        return decoder_op(i, part)

    normed, x = _norm(
        graph, config, float_weight(weights, f"{layer}.input_layernorm.weight"), x, skip, op("attn_norm")
    )
    qkv = [f"{layer}.self_attn.{p}_proj" for p in "qkv"]
    packed = _linear(graph, op("qkv"), normed, [weights[f"{n}.weight"] for n in qkv])
    bias = graph.weight(f"{op('qkv')}_bias", *(float_weight(weights, f"{n}.bias") for n in qkv))
    packed = graph.op("Add", [packed, bias], f"{op('qkv')}_biased")
    attended = graph.fused(
        "GroupQueryAttention",
        [packed, "", "", past_key(i), past_value(i), *context.inputs],
        op("attn"),
        outputs=[op("attn"), present_key(i), present_value(i)],
        num_heads=config.num_heads,
        kv_num_heads=config.num_kv_heads,
        scale=config.head_dim**-0.5,
        do_rotary=1,
        rotary_interleaved=0,
    )  # fmt: skip
    attended = _linear(graph, op("o"), attended, [weights[f"{layer}.self_attn.o_proj.weight"]])
    normed, x = _norm(
        graph,
        config,
        float_weight(weights, f"{layer}.post_attention_layernorm.weight"),
        x,
        attended,
        op("mlp_norm"),
    )
    gate = _linear(graph, op("gate"), normed, [weights[f"{layer}.mlp.gate_proj.weight"]])
    up = _linear(graph, op("up"), normed, [weights[f"{layer}.mlp.up_proj.weight"]])
    silu = graph.fused("QuickGelu", [gate], op("silu"), alpha=1.0)  # x * sigmoid(x) in one operator
    gated = graph.op("Mul", [silu, up], op("gated"))
    return x, _linear(graph, op("down"), gated, [weights[f"{layer}.mlp.down_proj.weight"]])


def _linear(graph: Graph, name: str, x: str, weights: list[Weight | QuantizedWeight]) -> str:
    """Multiply by W^T, with W as the checkpoint stores it, [out, in]: nothing is transposed on the way."""
    if integers := alike(QuantizedWeight, weights):
        whole = stacked(integers)
        return matmul(graph, name, x, store_affine(graph, whole), whole.rows)
    matrix = graph.weight(f"{name}_weight", *alike(Weight, weights))
    return graph.fused("FusedMatMul", [x, matrix], name, transB=1)


def _norm(
    graph: Graph, config: DecoderConfig, weight: Weight, x: str, skip: str, name: str
) -> tuple[str, str]:
    """RMSNorm of x + skip; returns it and the sum. The first norm of all has nothing to add."""
    scale = graph.weight(f"{name}_weight", weight)
    if not skip:
        normed = graph.op(
            "SimplifiedLayerNormalization",
            [x, scale],
            name,
            axis=-1,
            epsilon=config.norm_eps,
            stash_type=1,
        )
        return normed, x
    residual = f"{name}_residual"
    normed = graph.fused(
        "SkipSimplifiedLayerNormalization",
        [x, skip, scale],
        name,
        outputs=[name, "", "", residual],
        epsilon=config.norm_eps,
    )
    return normed, residual


def _last(graph: Graph, value: str, name: str) -> str:
    starts = graph.constant("minus_one", np.array([-1], np.int64))
    ends = graph.constant("end", np.array([np.iinfo(np.int64).max], np.int64))
    return graph.op("Slice", [value, starts, ends, "one"], name)
