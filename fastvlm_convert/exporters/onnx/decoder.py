"""Lower the Qwen2 decoder: fused attention with rotary positions inside, fused norms, KV cache in and out."""

import numpy as np

from fastvlm_convert.exporters.onnx.attention import Step, attend, start_step
from fastvlm_convert.exporters.onnx.cache import close_cache, open_cache
from fastvlm_convert.exporters.onnx.embed import Table
from fastvlm_convert.exporters.onnx.fused import StoredAffine, product, product_with_stored
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.ops import rms_norm_of_sum
from fastvlm_convert.io_names import BATCH, INPUTS_EMBEDS, LOGITS, SEQUENCE, decoder_op
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, float_weight
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import DecoderConfig


def build_decoder(
    graph: Graph, config: DecoderConfig, weights: MixedSource, recipe: Recipe, head: Table
) -> None:
    """Add the whole decoder to a graph.

    Args:
        graph: An empty graph.
        config: Dimensions.
        weights: Canonical names.
        recipe: Its context length is that of the rotary tables, so the most positions the graph can run.
        head: Where the head's table lies (see `embed.store_table`), possibly with rows beyond the vocabulary.
    """
    open_cache(graph, config)
    x = graph.input(INPUTS_EMBEDS, "float32", [BATCH, SEQUENCE, config.hidden_size])
    step = start_step(graph, config, recipe)
    if graph.compute != "float32":
        x = graph.cast(x, graph.compute, "inputs_cast")
    if config.residual_shift:
        scale = graph.constant("residual_scale", np.array(config.residual_scale, graph.compute))
        x = graph.op("Mul", "inputs_scaled", [x, scale])
    # The output of the last block, not yet added to the residual stream x. Before the first layer it is 0:
    # onnx.checker knows no RMSNorm that adds nothing, neither ONNX's before opset 23 nor ONNX Runtime's.
    skip = graph.op("Sub", "no_block", [x, x])
    for i in range(config.num_layers):
        x, skip = _layer(graph, config, weights, i, (x, skip), step)
    # Only the last position is needed, so the head runs on one row instead of the whole prompt.
    x, skip = _last(graph, "last_residual", x), _last(graph, "last_block", skip)
    final_scale = float_weight(weights, "decoder.norm.weight")
    normed, _ = rms_norm_of_sum(graph, "final_norm", x, skip, final_scale, config)
    _logits(graph, config, normed, head)
    close_cache(graph, config)


def _logits(graph: Graph, config: DecoderConfig, normed: str, head: Table) -> None:
    name = LOGITS if graph.compute == "float32" else "lm_head"
    if isinstance(head, StoredAffine):
        product_with_stored(graph, name, normed, head, config.vocab_size)
    else:
        shape = (config.vocab_size, config.hidden_size)
        matrix = graph.external("lm_head_weight", graph.storage, shape, head)
        if graph.storage != graph.compute:
            matrix = graph.cast(matrix, graph.compute, "lm_head_cast")
        graph.fused("FusedMatMul", name, [normed, matrix], transB=1)
    if name != LOGITS:
        graph.cast(name, "float32", LOGITS)
    graph.output(LOGITS, "float32", [BATCH, 1, config.vocab_size])


def _layer(
    graph: Graph, config: DecoderConfig, weights: MixedSource, i: int, stream: tuple[str, str], step: Step
) -> tuple[str, str]:
    """One layer; takes and returns the residual stream and what is still to be added to it."""
    layer = f"decoder.layers.{i}"

    def name(part: str) -> str:
        return decoder_op(i, part)

    def weight(module: str) -> list[AnyWeight]:
        return [weights[f"{layer}.{module}.weight"]]

    x, skip = stream
    scale = float_weight(weights, f"{layer}.input_layernorm.weight")
    normed, x = rms_norm_of_sum(graph, name("attn_norm"), x, skip, scale, config)
    attended = attend(graph, config, weights, i, normed, step)
    attended = product(graph, name("o"), attended, weight("self_attn.o_proj"))
    scale = float_weight(weights, f"{layer}.post_attention_layernorm.weight")
    normed, x = rms_norm_of_sum(graph, name("mlp_norm"), x, attended, scale, config)
    gate = product(graph, name("gate"), normed, weight("mlp.gate_proj"))
    up = product(graph, name("up"), normed, weight("mlp.up_proj"))
    silu = graph.fused("QuickGelu", name("silu"), [gate], alpha=1.0)  # x * sigmoid(x) in one operator
    gated = graph.op("Mul", name("gated"), [silu, up])
    return x, product(graph, name("down"), gated, weight("mlp.down_proj"))


def _last(graph: Graph, name: str, x: str) -> str:
    starts = graph.constant("minus_one", np.array([-1], np.int64))
    ends = graph.constant("end", np.array([np.iinfo(np.int64).max], np.int64))
    return graph.op("Slice", name, [x, starts, ends, "one"])
