"""The KV cache of a Core ML program: state inside, or tensors that go in and out."""

from collections.abc import Sequence
from typing import Any, Protocol

import coremltools
import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import Var, types

from fastvlm_convert.exporters.coreml.ops import Ops, mil_type
from fastvlm_convert.io_names import (
    KEY_CACHE,
    KEY_CACHE_OUT,
    VALUE_CACHE,
    VALUE_CACHE_OUT,
    FloatName,
    decoder_op,
)
from fastvlm_convert.weights.model_config import DecoderConfig


class Cache(Protocol):
    """Keys and values of all layers, each [layers, num_kv_heads, ctx, head_dim]."""

    def inputs(self) -> dict[str, Any]:
        """Placeholders of the function's inputs."""
        ...

    def input_types(self) -> list[Any]:
        """The same as coremltools' input types, where inputs are declared that way."""
        ...

    def start(self, ops: Ops, key: Var, value: Var) -> None:
        """Begin a function with its inputs."""
        ...

    def append(self, layer: int, key: Var, value: Var, position: Var, end: Var) -> tuple[Var, Var]:
        """Write [1, kv, n, head_dim] at [position, end); returns the layer's whole [1, kv, ctx, head_dim]."""
        ...

    def outputs(self) -> Sequence[Var]:
        """What the function gives beside the logits."""
        ...


class TensorCache:
    """The cache as inputs and outputs in the arithmetic's dtype, so that a test can judge that alone."""

    def __init__(self, config: DecoderConfig, context_length: int, dtype: FloatName) -> None:
        self._config = config
        self._shape = (config.num_layers, config.num_kv_heads, context_length, config.head_dim)
        self._dtype = dtype
        self._ops: Ops
        self._values: dict[str, Var] = {}

    def inputs(self) -> dict[str, Any]:
        return {name: mb.TensorSpec(self._shape, mil_type(self._dtype)) for name in (KEY_CACHE, VALUE_CACHE)}

    def input_types(self) -> list[Any]:
        dtype = np.float16 if self._dtype == "float16" else np.float32
        return [coremltools.TensorType(n, self._shape, dtype=dtype) for n in (KEY_CACHE, VALUE_CACHE)]

    def start(self, ops: Ops, key: Var, value: Var) -> None:
        self._ops = ops
        self._values = {KEY_CACHE: key, VALUE_CACHE: value}

    def append(self, layer: int, key: Var, value: Var, position: Var, end: Var) -> tuple[Var, Var]:
        config = self._config
        begin = mb.concat(values=[[layer, 0], position, [0]], axis=0, name=decoder_op(layer, "cache_begin"))
        stop = mb.concat(
            values=[[layer + 1, config.num_kv_heads], end, [config.head_dim]],
            axis=0,
            name=decoder_op(layer, "cache_end"),
        )
        rows = []
        for name, part, update in ((KEY_CACHE, "k", key), (VALUE_CACHE, "v", value)):
            written = self._write(name, decoder_op(layer, part), update, begin, stop, layer)
            all_rows = mb.slice_by_size(
                x=written,
                begin=[layer, 0, 0, 0],
                size=[1, *self._shape[1:]],
                name=decoder_op(layer, f"{part}_all"),
            )
            rows.append(all_rows)
        return rows[0], rows[1]

    def _write(self, name: str, op: str, update: Var, begin: Var, end: Var, layer: int) -> Var:
        update = self._ops.cast(update, self._dtype)
        is_last = layer == self._config.num_layers - 1
        out = {KEY_CACHE: KEY_CACHE_OUT, VALUE_CACHE: VALUE_CACHE_OUT}[name] if is_last else f"{op}_written"
        self._values[name] = mb.slice_update(
            x=self._values[name], update=update, begin=begin, end=end, name=out
        )
        return self._values[name]

    def outputs(self) -> Sequence[Var]:
        return [self._values[KEY_CACHE], self._values[VALUE_CACHE]]


class StateCache(TensorCache):
    """The cache as Core ML state, which is float16 whatever the arithmetic."""

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        super().__init__(config, context_length, "float16")
        self._states: dict[str, Var] = {}

    def inputs(self) -> dict[str, Any]:
        return {name: mb.StateTensorSpec(self._shape, types.fp16) for name in (KEY_CACHE, VALUE_CACHE)}

    def input_types(self) -> list[Any]:
        return []

    def start(self, ops: Ops, key: Var, value: Var) -> None:
        self._states = {KEY_CACHE: key, VALUE_CACHE: value}
        read = {name: mb.read_state(input=state, name=f"{name}_read") for name, state in self._states.items()}
        super().start(ops, read[KEY_CACHE], read[VALUE_CACHE])

    def _write(self, name: str, op: str, update: Var, begin: Var, end: Var, layer: int) -> Var:
        written = mb.slice_update(
            x=self._values[name],
            update=self._ops.cast(update, self._dtype),
            begin=begin,
            end=end,
            name=f"{op}_written",
        )
        self._values[name] = mb.coreml_update_state(
            state=self._states[name], value=written, name=f"{op}_cached"
        )
        return self._values[name]

    def outputs(self) -> Sequence[Var]:
        return []
