"""The KV cache of an ONNX graph: tensors that go in and out, which attention itself reads and extends.

It may grow with every call or be one buffer bound as past and present: GroupQueryAttention writes in place
when both are the same memory.
"""

from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.io_names import (
    ATTENTION_MASK,
    BATCH,
    PAST_SEQUENCE,
    TOTAL_SEQUENCE,
    past_key,
    past_value,
    present_key,
    present_value,
)
from fastvlm_convert.weights.model_config import DecoderConfig


def open_cache(graph: Graph, config: DecoderConfig) -> None:
    """Declare the cache among a graph's inputs, with the mask that tells how full it is."""
    graph.input(ATTENTION_MASK, "int64", [BATCH, TOTAL_SEQUENCE])
    shape: list[int | str] = [BATCH, config.num_kv_heads, PAST_SEQUENCE, config.head_dim]
    for i in range(config.num_layers):
        graph.input(past_key(i), graph.compute, shape)
        graph.input(past_value(i), graph.compute, shape)


def close_cache(graph: Graph, config: DecoderConfig) -> None:
    """Declare the cache among a graph's outputs."""
    shape: list[int | str] = [BATCH, config.num_kv_heads, TOTAL_SEQUENCE, config.head_dim]
    for i in range(config.num_layers):
        graph.output(present_key(i), graph.compute, shape)
        graph.output(present_value(i), graph.compute, shape)
