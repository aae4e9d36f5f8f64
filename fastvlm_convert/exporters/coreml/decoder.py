"""Lower the Qwen2 decoder as a function that appends to the KV cache and gives the logits of one token.

A call is told its position; the causal mask and the rotary embedding are made from it inside. Shapes: n
tokens of the call.
"""

from fastvlm_convert.exporters.coreml.attention import Step, attend, start_step
from fastvlm_convert.exporters.coreml.cache import open_cache
from fastvlm_convert.exporters.coreml.embed import store_table
from fastvlm_convert.exporters.coreml.graph import Graph, Lengths, scalar
from fastvlm_convert.exporters.coreml.ops import linear, rms_norm, zeros
from fastvlm_convert.exporters.coreml.support import AUTO_COMPUTE
from fastvlm_convert.exporters.coreml.values import FLEXIBLE, Value
from fastvlm_convert.exporters.coreml.weights import dense_rows
from fastvlm_convert.io_names import INPUTS_EMBEDS, LAST_INDEX, LOGITS, POSITION, decoder_op
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, float_weight
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import CoreMLSettings
from fastvlm_convert.weights.model_config import DecoderConfig


def build_decoder(
    graph: Graph, config: DecoderConfig, weights: MixedSource, recipe: Recipe, tokens: int
) -> None:
    """Add the whole decoder to a graph.

    Args:
        graph: An empty graph.
        config: Dimensions.
        weights: Canonical names.
        recipe: Cache, lengths and repairs. Its context length is a multiple of its prefill chunk.
        tokens: Tokens that a call appends; `FLEXIBLE` for as many as the recipe's lengths say.
    """
    shape, lengths = (1, tokens, config.hidden_size), _lengths(recipe.coreml, tokens)
    x = graph.input(INPUTS_EMBEDS, recipe.decoder.on(AUTO_COMPUTE).compute, shape, lengths=lengths)
    position = graph.input(POSITION, "int32", (1,))
    last = None if tokens == 1 else graph.input(LAST_INDEX, "int32", (1,))
    cache = open_cache(graph, config, recipe)
    step = start_step(graph, config, recipe, x, position, cache)
    if config.residual_shift:
        scale = scalar(graph.dtype("inputs_scaled"), config.residual_scale)
        x = graph.op("mul", "inputs_scaled", x=x, y=scale)
    for i in range(config.num_layers):
        x = _layer(graph, config, weights, i, x, step)
    if last is not None:
        x = _last(graph, "last_residual", x, last)
    normed = rms_norm(graph, "final_norm", x, float_weight(weights, "decoder.norm.weight"), config)
    for value in (_logits(graph, config, weights, normed), *cache.outputs()):
        graph.output(value)


def _lengths(settings: CoreMLSettings, tokens: int) -> Lengths | None:
    if tokens != FLEXIBLE:
        return None
    return Lengths(1, settings.prefill_chunk, is_range=settings.sequence_lengths == "range")


def _logits(graph: Graph, config: DecoderConfig, weights: MixedSource, normed: Value) -> Value:
    dtype = graph.dtype("lm_head")
    if config.tied:
        parts = store_table(graph, weights["decoder.embed_tokens.weight"])
    else:
        parts = dense_rows(graph, "lm_head_weight", weights["decoder.lm_head.weight"], dtype)

    def product(name: str, table: Value) -> Value:
        bias = zeros(graph, table.shape[0], dtype)
        return graph.op("linear", name, dtype, x=normed, weight=table, bias=bias)

    if len(parts) == 1:
        return product(LOGITS, parts[0])
    scores = [product(f"{LOGITS}_{i}", part) for i, part in enumerate(parts)]
    return graph.op("concat", LOGITS, dtype, values=scores, axis=-1)


def _layer(graph: Graph, config: DecoderConfig, weights: MixedSource, i: int, x: Value, step: Step) -> Value:
    layer = f"decoder.layers.{i}"

    def name(part: str) -> str:
        return decoder_op(i, part)

    def weight(module: str) -> list[AnyWeight]:
        return [weights[f"{layer}.{module}.weight"]]

    scale = float_weight(weights, f"{layer}.input_layernorm.weight")
    normed = rms_norm(graph, name("attn_norm"), x, scale, config)
    attended = attend(graph, config, weights, i, normed, step)
    attended = linear(graph, name("o"), attended, weight("self_attn.o_proj"))
    x = graph.op("add", name("attn_residual"), x=x, y=attended)
    scale = float_weight(weights, f"{layer}.post_attention_layernorm.weight")
    normed = rms_norm(graph, name("mlp_norm"), x, scale, config)
    gate = linear(graph, name("gate"), normed, weight("mlp.gate_proj"))
    up = linear(graph, name("up"), normed, weight("mlp.up_proj"))
    gated = graph.op("mul", name("gated"), x=graph.op("silu", name("silu"), x=gate), y=up)
    down = linear(graph, name("down"), gated, weight("mlp.down_proj"))
    return graph.op("add", name("residual"), x=x, y=down)


def _last(graph: Graph, name: str, x: Value, last: Value) -> Value:
    """Row `last` of [1, n, hidden]: the last real token of a padded chunk."""
    begin = graph.plain_op("concat", "last_begin", values=[[0], last, [0]], axis=0)
    return graph.plain_op("slice_by_size", name, x=x, begin=begin, size=[1, 1, x.shape[-1]])
