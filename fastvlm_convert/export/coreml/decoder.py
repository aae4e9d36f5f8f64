"""Lower the Qwen2 decoder: prefill, decode and embedding as functions over one set of weights.

The KV cache is Core ML state (iOS 18), float16 whatever the arithmetic. A call is told its position; the
causal mask and the rotary embedding are made from it inside. Shapes: n tokens of the call, ctx the context.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import coremltools
import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import Function, Var, get_new_symbol, types

from fastvlm_convert.contract import (
    DECODE,
    EMBED,
    INPUT_IDS,
    INPUTS_EMBEDS,
    KEY_CACHE,
    LAST_INDEX,
    LOGITS,
    POSITION,
    PREFILL,
    VALUE_CACHE,
    FloatName,
    decoder_op,
)
from fastvlm_convert.export.coreml.cache import Cache, StateCache, TensorCache
from fastvlm_convert.export.coreml.functions import build_function
from fastvlm_convert.export.coreml.ops import Ops, mil_type, scalar
from fastvlm_convert.export.coreml.weights import Weights
from fastvlm_convert.recipe import CoreMLSettings, FloatSettings
from fastvlm_convert.weights.config import DecoderConfig
from fastvlm_convert.weights.quantized import AnyWeight, MixedSource, float_weight
from fastvlm_convert.weights.source import Weight

TARGET = coremltools.target.iOS18
_MIN_ROW = 1e-3  # least divisor of a row before it is squared


@dataclass(frozen=True)
class _Step:
    """What all layers of one call share.

    Attributes:
        tokens: Tokens of the call, -1 where flexible.
        position: int32 [1], tokens already in the cache.
        end: int32 [1], position + tokens.
        cos: Rotary cosines, [1, 1, n, head_dim].
        sin: Rotary sines with the sign of the rotation, [1, 1, n, head_dim].
        mask: bool [1, 1, group * n, ctx], true where a query may look.
    """

    tokens: int
    position: Var
    end: Var
    cos: Var
    sin: Var
    mask: Var


class DecoderBuilder:
    """Builds the functions of the decoder package.

    Args:
        config: Dimensions.
        source: Canonical names.
        precision: Storage and compute dtype.
        settings: Cache and sequence lengths.
        context_length: Tokens the cache holds, a multiple of the prefill chunk.
        weights: The constants, shared by all functions.
    """

    def __init__(
        self,
        config: DecoderConfig,
        source: MixedSource,
        precision: FloatSettings,
        settings: CoreMLSettings,
        context_length: int,
        weights: Weights,
    ) -> None:
        self.config = config
        self.source = source
        self.settings = settings
        self.context_length = context_length
        self.border: FloatName = precision.compute
        self.ops = Ops(weights, precision)

    def functions(self) -> dict[str, Function]:
        """The functions by name; the first is the default."""
        if self.settings.sequence_lengths == "fixed":
            prefill = self._step_function(self.settings.prefill_chunk)
            return {DECODE: self._step_function(1), PREFILL: prefill, EMBED: self._embed_function()}
        return {DECODE: self._step_function(-1), EMBED: self._embed_function()}

    def _embed_function(self) -> Function:
        def body(inputs: Mapping[str, Var]) -> Sequence[Var]:
            self.ops.start_function()
            table = self._table()
            return [
                mb.gather(
                    x=table, indices=inputs[INPUT_IDS], axis=0, validate_indices=False, name=INPUTS_EMBEDS
                )
            ]

        spec = mb.TensorSpec((1, get_new_symbol()), types.int32)
        function = build_function({INPUT_IDS: spec}, body, TARGET)
        length = coremltools.RangeDim(1, self.settings.prefill_chunk, default=1)
        function.set_input_types((coremltools.TensorType(INPUT_IDS, (1, length), dtype=np.int32),))
        return function

    def _step_function(self, tokens: int) -> Function:
        """Append `tokens` (-1: flexible) to the cache and give the logits of one of them."""
        cache = (
            StateCache(self.config, self.context_length)
            if self.settings.kv_cache == "state"
            else TensorCache(self.config, self.context_length, self.border)
        )
        has_last = tokens != 1
        inputs: dict[str, Any] = {
            INPUTS_EMBEDS: mb.TensorSpec(
                (1, get_new_symbol() if tokens < 0 else tokens, self.config.hidden_size),
                mil_type(self.border),
            ),
            POSITION: mb.TensorSpec((1,), types.int32),
        }
        if has_last:
            inputs[LAST_INDEX] = mb.TensorSpec((1,), types.int32)
        inputs |= cache.inputs()

        def body(values: Mapping[str, Var]) -> Sequence[Var]:
            self.ops.start_function()
            cache.start(self.ops, values[KEY_CACHE], values[VALUE_CACHE])
            logits = self._logits(tokens, values, cache)
            return [logits, *cache.outputs()]

        function = build_function(inputs, body, TARGET)
        if tokens < 0:
            function.set_input_types(tuple(self._flexible_types(cache)))
        return function

    def _flexible_types(self, cache: Cache) -> list[Any]:
        chunk, hidden = self.settings.prefill_chunk, self.config.hidden_size
        dtype = np.float16 if self.border == "float16" else np.float32
        if self.settings.sequence_lengths == "range":
            shape: Any = (1, coremltools.RangeDim(1, chunk, default=1), hidden)
        else:
            shape = coremltools.EnumeratedShapes([(1, 1, hidden), (1, chunk, hidden)], default=(1, 1, hidden))
        numbers = [coremltools.TensorType(n, (1,), dtype=np.int32) for n in (POSITION, LAST_INDEX)]
        return [coremltools.TensorType(INPUTS_EMBEDS, shape, dtype=dtype), *numbers, *cache.input_types()]

    def _logits(self, tokens: int, values: Mapping[str, Var], cache: Cache) -> Var:
        config = self.config
        x = values[INPUTS_EMBEDS]
        step = self._step(tokens, x, values[POSITION])
        for i in range(config.num_layers):
            x = self._layer(i, x, step, cache)
        if LAST_INDEX in values:
            begin = mb.concat(values=[[0], values[LAST_INDEX], [0]], axis=0, name="last_begin")
            x = mb.slice_by_size(x=x, begin=begin, size=[1, 1, config.hidden_size], name="last_residual")
        normed = self._norm("final_norm", x, float_weight(self.source, "decoder.norm.weight"))
        rows = config.vocab_size
        dtype = self.ops.dtype("lm_head")
        table = (
            self._table()
            if config.tied
            else self.ops.weight("lm_head_weight", "lm_head", self.source["decoder.lm_head.weight"])
        )
        zeros = self.ops.weights.constant(f"zeros_{rows}_{dtype}", dtype, dtype, np.zeros(rows))
        return self.ops.op("linear", LOGITS, dtype, x=normed, weight=table, bias=zeros)

    def _table(self) -> Var:
        weight = self.source["decoder.embed_tokens.weight"]
        return self.ops.weight("embed_tokens_weight", "lm_head", weight)

    def _step(self, tokens: int, x: Var, position: Var) -> _Step:
        """Slice the tables at the position and make the causal mask."""
        config, context = self.config, self.context_length
        count: Any = tokens
        if tokens < 0:
            count = mb.slice_by_size(x=mb.shape(x=x, name="x_shape"), begin=[1], size=[1], name="num_tokens")
        else:
            count = np.int32(tokens)
        end = mb.add(x=position, y=count, name="end")
        cos, sin = (self._rotary_rows(part, tokens, position, end) for part in ("cos", "sin"))
        # Row r of the call is at position + r and sees every cache entry up to itself.
        longest = self.settings.prefill_chunk if tokens < 0 else tokens
        rows = mb.const(val=np.arange(longest, dtype=np.int32), name="row_numbers")
        if tokens < 0:
            rows = mb.slice_by_index(x=rows, begin=[0], end=count, name="rows_of_call")
        rows = mb.add(x=rows, y=position, name="row_positions")
        rows = mb.reshape(x=rows, shape=[1, 1, tokens, 1], name="row_positions_4d")
        columns = mb.const(
            val=np.arange(context, dtype=np.int32).reshape(1, 1, 1, context), name="column_numbers"
        )
        mask = mb.less_equal(x=columns, y=rows, name="causal_mask")
        group = config.num_heads // config.num_kv_heads
        if group > 1:
            mask = mb.concat(values=[mask] * group, axis=2, name="causal_mask_grouped")
        return _Step(tokens, position, end, cos, sin, mask)

    def _rotary_rows(self, part: str, tokens: int, position: Var, end: Var) -> Var:
        """Rows [position, end) of a rotary table, [1, 1, n, head_dim]."""
        head_dim = self.config.head_dim
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        angles = np.outer(np.arange(self.context_length), self.config.rope_theta**-exponents)
        # A rotated pair is (x1 cos - x2 sin, x2 cos + x1 sin): the minus lies in the table.
        halves = [np.cos(angles)] * 2 if part == "cos" else [-np.sin(angles), np.sin(angles)]
        table = self.ops.weights.constant(
            f"rotary_{part}",
            self.ops.precision.storage,
            self.ops.precision.compute,
            np.concatenate(halves, -1)[None, None],
        )
        begin = mb.concat(values=[[0, 0], position, [0]], axis=0, name=f"{part}_begin")
        if tokens > 0:
            return mb.slice_by_size(x=table, begin=begin, size=[1, 1, tokens, head_dim], name=part)
        stop = mb.concat(values=[[1, 1], end, [head_dim]], axis=0, name=f"{part}_end")
        return mb.slice_by_index(x=table, begin=begin, end=stop, name=part)

    def _layer(self, i: int, x: Var, step: _Step, cache: Cache) -> Var:
        ops, source = self.ops, self.source
        layer = f"decoder.layers.{i}"

        def name(part: str) -> str:
            return decoder_op(i, part)

        def weight(module: str) -> list[AnyWeight]:
            return [source[f"{layer}.{module}.weight"]]

        normed = self._norm(name("attn_norm"), x, float_weight(source, f"{layer}.input_layernorm.weight"))
        attended = self._attention(i, normed, step, cache)
        attended = ops.linear(name("o"), attended, weight("self_attn.o_proj"))
        x = ops.op("add", name("attn_residual"), x=x, y=attended)
        normed = self._norm(
            name("mlp_norm"), x, float_weight(source, f"{layer}.post_attention_layernorm.weight")
        )
        gate = ops.linear(name("gate"), normed, weight("mlp.gate_proj"))
        up = ops.linear(name("up"), normed, weight("mlp.up_proj"))
        gated = ops.op("mul", name("gated"), x=ops.op("silu", name("silu"), x=gate), y=up)
        down = ops.linear(name("down"), gated, weight("mlp.down_proj"))
        return ops.op("add", name("residual"), x=x, y=down)

    def _attention(self, i: int, x: Var, step: _Step, cache: Cache) -> Var:
        config, ops, n = self.config, self.ops, step.tokens
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

        def name(part: str) -> str:
            return decoder_op(i, part)

        projections = [f"decoder.layers.{i}.self_attn.{p}_proj" for p in "qkv"]
        packed = ops.linear(
            name("qkv"),
            x,
            [self.source[f"{p}.weight"] for p in projections],
            [self.source[f"{p}.bias"] for p in projections],
        )
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        parts = mb.split(x=packed, split_sizes=widths, axis=-1, name=name("qkv_split"))
        query, key, value = (
            mb.transpose(
                x=mb.reshape(x=part, shape=[1, n, -1 if n > 0 else count, head_dim], name=name(f"{p}_heads")),
                perm=[0, 2, 1, 3],
                name=name(f"{p}_transposed"),
            )
            for p, part, count in zip("qkv", parts, (heads, kv_heads, kv_heads), strict=True)
        )
        query, key = self._rotate(name("q"), query, step), self._rotate(name("k"), key, step)
        keys, values = cache.append(i, key, value, step.position, step.end)
        # Queries that share a key head stand in its rows, so keys and values need no copies.
        group = heads // kv_heads
        query = mb.reshape(
            x=query, shape=[1, kv_heads, group * n if n > 0 else -1, head_dim], name=name("q_grouped")
        )
        mixed = ops.op(
            "scaled_dot_product_attention",
            name("attn"),
            query=query,
            key=keys,
            value=values,
            attn_mask=step.mask,
        )
        mixed = mb.reshape(x=mixed, shape=[1, heads, n, head_dim], name=name("attn_heads"))
        mixed = mb.transpose(x=mixed, perm=[0, 2, 1, 3], name=name("attn_transposed"))
        return mb.reshape(x=mixed, shape=[1, n, heads * head_dim], name=name("attn_flat"))

    def _rotate(self, name: str, x: Var, step: _Step) -> Var:
        """Rotary embedding of [1, heads, n, head_dim]."""
        ops = self.ops
        first, second = mb.split(x=x, num_splits=2, axis=-1, name=f"{name}_halves")
        swapped = mb.concat(values=[second, first], axis=-1, name=f"{name}_swapped")
        straight = ops.op("mul", f"{name}_cos", x=x, y=step.cos)
        crossed = ops.op("mul", f"{name}_sin", x=swapped, y=step.sin)
        return ops.op("add", f"{name}_rotated", x=straight, y=crossed)

    def _norm(self, name: str, x: Var, weight: Weight) -> Var:
        """RMSNorm. In float16 a row is divided by its largest magnitude first, so that no square overflows.

        With m = max(|x|, 1e-3), y = x / m and e = sqrt(eps) / m it is y / sqrt(mean(y^2) + e^2) * w: the
        same in real arithmetic, finite for rows of zeros, of thousands and with outliers.
        """
        ops, eps = self.ops, self.config.rms_norm_eps
        dtype = ops.dtype(name)

        def op(kind: str, part: str, **arguments: Any) -> Var:  # noqa: ANN401
            return ops.op(kind, f"{name}_{part}" if part else name, dtype, **arguments)

        scale = ops.weight(f"{name}_weight", name, weight)
        if dtype == "float32":
            mean = op("reduce_mean", "mean", x=op("square", "squared", x=x), axes=[-1], keep_dims=True)
            root = op("rsqrt", "rsqrt", x=mean, epsilon=scalar(dtype, eps))
            return op("mul", "", x=op("mul", "unit", x=x, y=root), y=scale)
        largest = op("reduce_max", "largest", x=op("abs", "abs", x=x), axes=[-1], keep_dims=True)
        divisor = op("maximum", "divisor", x=largest, y=scalar(dtype, _MIN_ROW))
        y = op("real_div", "scaled", x=x, y=divisor)
        e = op("real_div", "scaled_eps", x=scalar(dtype, math.sqrt(eps)), y=divisor)
        mean = op("reduce_mean", "mean", x=op("mul", "squared", x=y, y=y), axes=[-1], keep_dims=True)
        total = op("add", "mean_eps", x=mean, y=op("mul", "eps_squared", x=e, y=e))
        root = op("rsqrt", "rsqrt", x=total, epsilon=scalar(dtype, 0))
        return op("mul", "", x=op("mul", "unit", x=y, y=root), y=scale)
