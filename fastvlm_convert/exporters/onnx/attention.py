"""Lower the decoder's attention: one operator with the rotary embedding and the KV cache inside."""

from dataclasses import dataclass

import numpy as np

from fastvlm_convert.exporters.onnx.fused import product
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.weights import floats
from fastvlm_convert.exporters.rotary import rotary_tables
from fastvlm_convert.io_names import (
    ATTENTION_MASK,
    decoder_op,
    past_key,
    past_value,
    present_key,
    present_value,
)
from fastvlm_convert.quantized.weight import MixedSource, float_weight
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.storage import to_storage


@dataclass(frozen=True)
class Step:
    """What all layers of one call share.

    Attributes:
        past_length: int32 [1], tokens already in the cache.
        total_length: int32 scalar, tokens in the cache once the call is done.
        cos: Rotary cosines of all positions, [ctx, head_dim / 2].
        sin: Rotary sines of all positions, [ctx, head_dim / 2].
    """

    past_length: str
    total_length: str
    cos: str
    sin: str


def start_step(graph: Graph, config: DecoderConfig, recipe: Recipe) -> Step:
    """Add what all layers share: the cache's fill, from the mask, and the rotary tables."""
    one = graph.constant("one", np.array([1], np.int64))
    graph.op("ReduceSum", "mask_sum", [ATTENTION_MASK, one], keepdims=0)
    graph.op("Sub", "past_length_int64", ["mask_sum", one])
    graph.op("Shape", "mask_shape", [ATTENTION_MASK])
    graph.op("Gather", "total_length_int64", ["mask_shape", graph.constant("second", np.array(1, np.int64))])
    cos, sin = rotary_tables(config, recipe.common.max_context_length)
    return Step(
        past_length=graph.cast("past_length_int64", "int32", "past_length"),
        total_length=graph.cast("total_length_int64", "int32", "total_length"),
        cos=_table(graph, "cos_cache", cos),
        sin=_table(graph, "sin_cache", sin),
    )


def _table(graph: Graph, name: str, values: np.ndarray) -> str:
    """A table that is no weight of the model, so it is stored as precisely as it is used."""
    stored = to_storage(values, graph.compute, name)
    return graph.external(name, graph.compute, values.shape, graph.data.append([stored], stored.nbytes))


def attend(graph: Graph, config: DecoderConfig, weights: MixedSource, layer: int, x: str, step: Step) -> str:
    """Attention of a layer without its output projection; [B, n, hidden] -> [B, n, heads * head_dim]."""

    def op(part: str) -> str:
        return decoder_op(layer, part)

    projections = [f"decoder.layers.{layer}.self_attn.{p}_proj" for p in "qkv"]
    packed = product(graph, op("qkv"), x, [weights[f"{p}.weight"] for p in projections])
    bias = floats(graph, f"{op('qkv')}_bias", [float_weight(weights, f"{p}.bias") for p in projections])
    packed = graph.op("Add", f"{op('qkv')}_biased", [packed, bias])
    cache = [past_key(layer), past_value(layer)]
    return graph.fused(
        "GroupQueryAttention",
        op("attn"),
        [packed, "", "", *cache, step.past_length, step.total_length, step.cos, step.sin],
        outputs=[op("attn"), present_key(layer), present_value(layer)],
        num_heads=config.num_heads,
        kv_num_heads=config.num_kv_heads,
        scale=config.head_dim**-0.5,
        do_rotary=1,
        rotary_interleaved=0,
    )
