"""The KV cache of a Core ML program: state inside, or tensors that go in and out."""

from collections.abc import Sequence
from typing import Final, Protocol

from fastvlm_convert.exporters.coreml.graph import Graph
from fastvlm_convert.exporters.coreml.support import AUTO_COMPUTE
from fastvlm_convert.exporters.coreml.values import Value
from fastvlm_convert.io_names import (
    KEY_CACHE,
    KEY_CACHE_OUT,
    VALUE_CACHE,
    VALUE_CACHE_OUT,
    FloatName,
    decoder_op,
)
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import DecoderConfig

_OUTPUTS: Final = {KEY_CACHE: KEY_CACHE_OUT, VALUE_CACHE: VALUE_CACHE_OUT}


class Cache(Protocol):
    """Keys and values of all layers, each [layers, num_kv_heads, ctx, head_dim]."""

    def append(
        self, layer: int, key: Value, value: Value, position: Value, end: Value
    ) -> tuple[Value, Value]:
        """Write [1, kv, n, head_dim] at [position, end); returns the layer's whole [1, kv, ctx, head_dim]."""
        ...

    def outputs(self) -> Sequence[Value]:
        """What the function gives beside the logits."""
        ...


def open_cache(graph: Graph, config: DecoderConfig, recipe: Recipe) -> Cache:
    """Declare the cache among a graph's inputs."""
    shape = (config.num_layers, config.num_kv_heads, recipe.common.max_context_length, config.head_dim)
    if recipe.coreml.kv_cache == "state":
        return StateCache(graph, shape, "float16")
    return TensorCache(graph, shape, recipe.decoder.on(AUTO_COMPUTE).compute)


class TensorCache:
    """The cache as inputs and outputs in the arithmetic's dtype, so that a test can judge that alone."""

    def __init__(self, graph: Graph, shape: tuple[int, int, int, int], dtype: FloatName) -> None:
        self._graph = graph
        self._shape = shape
        self._dtype: FloatName = dtype
        self._values = self._declared()

    def _declared(self) -> dict[str, Value]:
        return {name: self._graph.input(name, self._dtype, self._shape) for name in _OUTPUTS}

    def append(
        self, layer: int, key: Value, value: Value, position: Value, end: Value
    ) -> tuple[Value, Value]:
        graph, (_, kv_heads, _, head_dim) = self._graph, self._shape
        before, after = [[layer, 0], position, [0]], [[layer + 1, kv_heads], end, [head_dim]]
        span = (
            graph.plain_op("concat", decoder_op(layer, "cache_begin"), values=before, axis=0),
            graph.plain_op("concat", decoder_op(layer, "cache_end"), values=after, axis=0),
        )
        return (
            self._append_to(KEY_CACHE, layer, decoder_op(layer, "k"), key, span),
            self._append_to(VALUE_CACHE, layer, decoder_op(layer, "v"), value, span),
        )

    def _append_to(self, cache: str, layer: int, op: str, update: Value, span: tuple[Value, Value]) -> Value:
        is_last = layer == self._shape[0] - 1
        self._values[cache] = self._written(cache, op, update, span, is_last)
        begin, size = [layer, 0, 0, 0], [1, *self._shape[1:]]
        return self._graph.plain_op(
            "slice_by_size", f"{op}_all", x=self._values[cache], begin=begin, size=size
        )

    def _written(self, cache: str, op: str, update: Value, span: tuple[Value, Value], is_last: bool) -> Value:
        name = _OUTPUTS[cache] if is_last else f"{op}_written"
        return self._updated(cache, name, update, span)

    def _updated(self, cache: str, name: str, update: Value, span: tuple[Value, Value]) -> Value:
        rows, (begin, end) = self._graph.cast(update, self._dtype), span
        return self._graph.plain_op(
            "slice_update", name, x=self._values[cache], update=rows, begin=begin, end=end
        )

    def outputs(self) -> Sequence[Value]:
        return [self._values[KEY_CACHE], self._values[VALUE_CACHE]]


class StateCache(TensorCache):
    """The cache as Core ML state, which is float16 whatever the arithmetic."""

    def _declared(self) -> dict[str, Value]:
        graph, dtype, shape = self._graph, self._dtype, self._shape
        self._states = {name: graph.input(name, dtype, shape, kind="state") for name in _OUTPUTS}
        return {
            name: graph.plain_op("read_state", f"{name}_read", input=state)
            for name, state in self._states.items()
        }

    def _written(self, cache: str, op: str, update: Value, span: tuple[Value, Value], is_last: bool) -> Value:
        written = self._updated(cache, f"{op}_written", update, span)
        return self._graph.plain_op(
            "coreml_update_state", f"{op}_cached", state=self._states[cache], value=written
        )

    def outputs(self) -> Sequence[Value]:
        return []
