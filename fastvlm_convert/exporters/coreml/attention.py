"""Lower the decoder's attention: causal mask and rotary embedding from the position, scores fused or not.

Shapes: n tokens of the call, ctx the context, D head_dim, group the query heads that share a key head.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastvlm_convert.exporters.coreml.cache import Cache
from fastvlm_convert.exporters.coreml.graph import Graph, scalar
from fastvlm_convert.exporters.coreml.ops import HIDDEN, attention, linear
from fastvlm_convert.exporters.coreml.values import FLEXIBLE, Value
from fastvlm_convert.exporters.rotary import rotary_tables
from fastvlm_convert.io_names import FloatName, decoder_op
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, float_weight
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.source import Weight, computed
from fastvlm_convert.weights.storage import to_storage


@dataclass(frozen=True)
class Step:
    """What all layers of one call share.

    Attributes:
        tokens: Tokens of the call, or `FLEXIBLE`.
        position: int32 [1], tokens already in the cache.
        end: int32 [1], position + tokens.
        cos: Rotary cosines, [1, 1, n, D].
        sin: Rotary sines with the sign of the rotation, [1, 1, n, D].
        mask: bool [1, 1, group * n, ctx], true where a query may look.
        cache: Keys and values of all layers.
        recipe: Which layers' scores are not fused, and the context length.
    """

    tokens: int
    position: Value
    end: Value
    cos: Value
    sin: Value
    mask: Value
    cache: Cache
    recipe: Recipe


def start_step(
    graph: Graph, config: DecoderConfig, recipe: Recipe, x: Value, position: Value, cache: Cache
) -> Step:
    """Slice the rotary tables at the position and make the causal mask."""
    context, tokens = recipe.common.max_context_length, x.shape[1]
    count: Any = np.int32(tokens)
    if tokens == FLEXIBLE:
        shape = graph.plain_op("shape", "x_shape", x=x)
        count = graph.plain_op("slice_by_size", "num_tokens", x=shape, begin=[1], size=[1])
    end = graph.plain_op("add", "end", x=position, y=count)
    cos, sin = (
        _rotary_rows(graph, config, part, tokens, (position, end), context) for part in ("cos", "sin")
    )
    # Row r of the call is at position + r and sees every cache entry up to itself.
    longest = recipe.coreml.prefill_chunk if tokens == FLEXIBLE else tokens
    rows = graph.numbers("row_numbers", np.arange(longest, dtype=np.int32))
    if tokens == FLEXIBLE:
        rows = graph.plain_op("slice_by_index", "rows_of_call", x=rows, begin=[0], end=count)
    rows = graph.plain_op("add", "row_positions", x=rows, y=position)
    rows = graph.plain_op("reshape", "row_positions_4d", x=rows, shape=[1, 1, tokens, 1])
    columns = np.arange(context, dtype=np.int32).reshape(1, 1, 1, context)
    mask = graph.plain_op("less_equal", "causal_mask", x=graph.numbers("column_numbers", columns), y=rows)
    group = config.num_heads // config.num_kv_heads
    if group > 1:
        mask = graph.plain_op("concat", "causal_mask_grouped", values=[mask] * group, axis=2)
    return Step(tokens, position, end, cos, sin, mask, cache, recipe)


def _rotary_rows(
    graph: Graph, config: DecoderConfig, part: str, tokens: int, span: tuple[Value, Value], context: int
) -> Value:
    """Rows [position, end) of a rotary table, [1, 1, n, D]."""
    (position, end), head_dim, precision = span, config.head_dim, graph.precision

    def table() -> np.ndarray:
        # A rotated pair is (x1 cos - x2 sin, x2 cos + x1 sin): the minus lies in the table.
        cos, sin = rotary_tables(config, context)
        halves = [cos, cos] if part == "cos" else [-sin, sin]
        return to_storage(np.concatenate(halves, -1)[None, None], precision.storage, f"rotary_{part}")

    shape = (1, 1, context, head_dim)
    rows = graph.floats(f"rotary_{part}", shape, table, precision.storage, precision.compute)
    begin = graph.plain_op("concat", f"{part}_begin", values=[[0, 0], position, [0]], axis=0)
    if tokens != FLEXIBLE:
        return graph.plain_op("slice_by_size", part, x=rows, begin=begin, size=[1, 1, tokens, head_dim])
    stop = graph.plain_op("concat", f"{part}_end", values=[[1, 1], end, [head_dim]], axis=0)
    return graph.plain_op("slice_by_index", part, x=rows, begin=begin, end=stop)


def attend(
    graph: Graph, config: DecoderConfig, weights: MixedSource, layer: int, x: Value, step: Step
) -> Value:
    """Attention of a layer without its output projection; [1, n, hidden] -> [1, n, heads * D]."""
    heads, kv_heads, head_dim, n = config.num_heads, config.num_kv_heads, config.head_dim, step.tokens

    def name(part: str) -> str:
        return decoder_op(layer, part)

    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    packed = _packed(graph, weights, layer, x, step)
    parts = graph.split_op("split", name("qkv_split"), x=packed, split_sizes=widths, axis=-1)
    query, key, value = (
        _heads(graph, name(p), part, FLEXIBLE if n != FLEXIBLE else count, config)
        for p, part, count in zip("qkv", parts, (heads, kv_heads, kv_heads), strict=True)
    )
    query = _rotate(graph, name("q"), query, (step.cos, step.sin))
    key = _rotate(graph, name("k"), key, (step.cos, step.sin))
    keys, values = step.cache.append(layer, key, value, step.position, step.end)
    # Queries that share a key head stand in its rows, so keys and values need no copies.
    rows = FLEXIBLE if n == FLEXIBLE else heads // kv_heads * n
    query = graph.plain_op("reshape", name("q_grouped"), x=query, shape=[1, kv_heads, rows, head_dim])
    if step.recipe.repairs.has_float32_scores(layer):
        mixed = _mixed_in_float32(graph, config, weights, layer, (query, keys, values), step)
    else:
        is_fused = step.recipe.coreml.attention == "fused"
        mixed = attention(graph, name("attn"), (query, keys, values), step.mask, is_fused=is_fused)
    mixed = graph.plain_op("reshape", name("attn_heads"), x=mixed, shape=[1, heads, n, head_dim])
    mixed = graph.plain_op("transpose", name("attn_transposed"), x=mixed, perm=[0, 2, 1, 3])
    return graph.plain_op("reshape", name("attn_flat"), x=mixed, shape=[1, n, heads * head_dim])


def _packed(graph: Graph, weights: MixedSource, layer: int, x: Value, step: Step) -> Value:
    """Queries, keys and values of one product; keys without bias where it is kept apart."""
    projections = [f"decoder.layers.{layer}.self_attn.{p}_proj" for p in "qkv"]
    biases: list[AnyWeight] = [weights[f"{p}.bias"] for p in projections]
    if layer in step.recipe.repairs.separate_key_bias:
        shape = biases[1].shape
        biases[1] = computed(shape, "float32", lambda: np.zeros(shape))
    matrices = [weights[f"{p}.weight"] for p in projections]
    return linear(graph, decoder_op(layer, "qkv"), x, matrices, biases)


def _heads(graph: Graph, name: str, x: Value, count: int, config: DecoderConfig) -> Value:
    """[1, n, heads * D] -> [1, heads, n, D]."""
    shape = [1, x.shape[1], count, config.head_dim]
    split = graph.plain_op("reshape", f"{name}_heads", x=x, shape=shape)
    return graph.plain_op("transpose", f"{name}_transposed", x=split, perm=[0, 2, 1, 3])


def _rotate(
    graph: Graph, name: str, x: Value, tables: tuple[Value, Value], dtype: FloatName | None = None
) -> Value:
    """The pairs of [1, heads, n, D], turned as the tables (cosines and sines) say."""
    first, second = graph.split_op("split", f"{name}_halves", x=x, num_splits=2, axis=-1)
    swapped = graph.plain_op("concat", f"{name}_swapped", values=[second, first], axis=-1)
    straight = graph.op("mul", f"{name}_cos", dtype, x=x, y=tables[0])
    crossed = graph.op("mul", f"{name}_sin", dtype, x=swapped, y=tables[1])
    return graph.op("add", f"{name}_rotated", dtype, x=straight, y=crossed)


def _mixed_in_float32(
    graph: Graph,
    config: DecoderConfig,
    weights: MixedSource,
    layer: int,
    heads: tuple[Value, Value, Value],
    step: Step,
) -> Value:
    """softmax(q k^T / sqrt(D)) v, one operation after the other; only the last is not float32."""
    query, keys, values = heads

    def op(kind: str, part: str, **inputs: Any) -> Value:  # noqa: ANN401
        return graph.op(kind, decoder_op(layer, part), "float32", **inputs)

    if layer in step.recipe.repairs.separate_key_bias:
        products = op("matmul", "attn_products", x=query, y=keys, transpose_y=True)
        bias = float_weight(weights, f"decoder.layers.{layer}.self_attn.k_proj.bias")
        scores = op("add", "attn_scores", x=products, y=_bias_scores(graph, config, layer, query, bias, step))
    else:
        scores = op("matmul", "attn_scores", x=query, y=keys, transpose_y=True)
    scaled = op("mul", "attn_scaled", x=scores, y=scalar("float32", config.head_dim**-0.5))
    masked = op("select", "attn_masked", cond=step.mask, a=scaled, b=scalar("float32", HIDDEN["float32"]))
    shares = op("softmax", "attn_weights", x=masked, axis=-1)
    return graph.op("matmul", decoder_op(layer, "attn"), x=shares, y=values)


def _bias_scores(
    graph: Graph, config: DecoderConfig, layer: int, query: Value, bias: Weight, step: Step
) -> Value:
    """What the rotated bias of the keys adds to the scores, float32 [1, kv_heads, group * n, ctx].

    With pairs as complex numbers, q . R_p b is the real part of conj(q) b e^(ip), so the query is turned
    back by b once and multiplied by the cosines and sines of all positions, which all layers share.
    """
    context = step.recipe.common.max_context_length

    def halves(part: str) -> np.ndarray:
        first, second = np.split(bias.array().reshape(1, -1, 1, config.head_dim), 2, -1)
        return np.concatenate([first, first] if part == "straight" else [second, -second], -1)

    def columns() -> np.ndarray:
        return np.concatenate([table.T for table in rotary_tables(config, context)])[None, None]

    shape = (1, config.num_kv_heads, 1, config.head_dim)
    straight, crossed = (
        graph.constant(decoder_op(layer, f"key_bias_{part}"), shape, partial(halves, part), "float32")
        for part in ("straight", "crossed")
    )
    turned = _rotate(
        graph, decoder_op(layer, "bias"), graph.cast(query, "float32"), (straight, crossed), "float32"
    )
    all_columns = graph.constant("rotary_columns", (1, 1, config.head_dim, context), columns, "float32")
    return graph.op("matmul", decoder_op(layer, "bias_scores"), "float32", x=turned, y=all_columns)
