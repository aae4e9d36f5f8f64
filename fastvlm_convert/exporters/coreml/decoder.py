"""Lower the Qwen2 decoder: prefill, decode and embedding as functions over one set of weights.

The KV cache is Core ML state (iOS 18), float16 whatever the arithmetic. A call is told its position; the
causal mask and the rotary embedding are made from it inside. Shapes: n tokens of the call, ctx the context.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import coremltools
import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import Function, Var, get_new_symbol, types

from fastvlm_convert.exporters.coreml.attention import AttentionBuilder, Step
from fastvlm_convert.exporters.coreml.cache import Cache, StateCache, TensorCache
from fastvlm_convert.exporters.coreml.functions import build_function
from fastvlm_convert.exporters.coreml.ops import Ops, mil_type, scalar
from fastvlm_convert.exporters.coreml.weights import Weights
from fastvlm_convert.io_names import (
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
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, float_weight
from fastvlm_convert.recipe import CoreMLSettings, FloatSettings, RepairSettings
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.source import Weight

TARGET = coremltools.target.iOS18
_MIN_ROW = 1e-3  # least divisor of a row before it is squared


class DecoderBuilder:
    """Builds the functions of the decoder package.

    Args:
        config: Dimensions.
        source: Canonical names.
        precision: Storage and compute dtype.
        settings: Cache and sequence lengths.
        repairs: Which layers' scores are not fused.
        context_length: Tokens the cache holds, a multiple of the prefill chunk.
        weights: The constants, shared by all functions.
    """

    def __init__(
        self,
        config: DecoderConfig,
        source: MixedSource,
        precision: FloatSettings,
        settings: CoreMLSettings,
        repairs: RepairSettings,
        context_length: int,
        weights: Weights,
    ) -> None:
        self.config = config
        self.source = source
        self.settings = settings
        self.context_length = context_length
        self.border: FloatName = precision.compute
        self.ops = Ops(weights, precision)
        self.attention = AttentionBuilder(config, source, settings, repairs, context_length, self.ops)

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
        step = self.attention.step(tokens, x, values[POSITION])
        if config.residual_shift:
            scale = scalar(self.ops.dtype("inputs_scaled"), config.residual_scale)
            x = self.ops.op("mul", "inputs_scaled", x=x, y=scale)
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

    def _layer(self, i: int, x: Var, step: Step, cache: Cache) -> Var:
        ops, source = self.ops, self.source
        layer = f"decoder.layers.{i}"

        def name(part: str) -> str:
            return decoder_op(i, part)

        def weight(module: str) -> list[AnyWeight]:
            return [source[f"{layer}.{module}.weight"]]

        normed = self._norm(name("attn_norm"), x, float_weight(source, f"{layer}.input_layernorm.weight"))
        attended = self.attention.attend(i, normed, step, cache)
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

    def _norm(self, name: str, x: Var, weight: Weight) -> Var:
        """RMSNorm. In float16 a row is divided by its largest magnitude first, so that no square overflows.

        With m = max(|x|, 1e-3), y = x / m and e = sqrt(eps) / m it is y / sqrt(mean(y^2) + e^2) * w: the
        same in real arithmetic, finite for rows of zeros, of thousands and with outliers.
        """
        ops, eps = self.ops, self.config.norm_eps
        dtype = ops.dtype(name)

        def op(kind: str, part: str, **arguments: Any) -> Var:  # noqa: ANN401
            return ops.op(kind, f"{name}_{part}" if part else name, dtype, **arguments)

        scale = ops.weight(f"{name}_weight", name, weight)
        if dtype == "float32":
            mean = op("reduce_mean", "mean", x=op("square", "squared", x=x), axes=[-1], keep_dims=True)
            root = op("rsqrt", "rsqrt", x=mean, epsilon=scalar(dtype, eps))
            return op("mul", "", x=op("mul", "unit", x=x, y=root), y=scale)
        largest = op("reduce_max", "largest", x=op("abs", "abs", x=x), axes=[-1], keep_dims=True)
        divisor = op("maximum", "divisor", x=largest, y=scalar(dtype, _MIN_ROW * self.config.residual_scale))
        y = op("real_div", "scaled", x=x, y=divisor)
        e = op("real_div", "scaled_eps", x=scalar(dtype, math.sqrt(eps)), y=divisor)
        mean = op("reduce_mean", "mean", x=op("mul", "squared", x=y, y=y), axes=[-1], keep_dims=True)
        total = op("add", "mean_eps", x=mean, y=op("mul", "eps_squared", x=e, y=e))
        root = op("rsqrt", "rsqrt", x=total, epsilon=scalar(dtype, 0))
        return op("mul", "", x=op("mul", "unit", x=y, y=root), y=scale)
