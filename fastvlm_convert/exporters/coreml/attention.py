"""Lower the decoder's attention: causal mask and rotary embedding from the position, scores fused or not.

Shapes: n tokens of the call, ctx the context, D head_dim, group the query heads that share a key head.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import Var

from fastvlm_convert.exporters.coreml.cache import Cache
from fastvlm_convert.exporters.coreml.ops import Ops, scalar
from fastvlm_convert.exporters.rotary import rotary_tables
from fastvlm_convert.io_names import FloatName, decoder_op
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, float_weight
from fastvlm_convert.recipe import CoreMLSettings, RepairSettings
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.source import computed

_HIDDEN: Final = -1e30  # a score that no query sees; finite, so that no infinity is ever computed


@dataclass(frozen=True)
class Step:
    """What all layers of one call share.

    Attributes:
        tokens: Tokens of the call, -1 where flexible.
        position: int32 [1], tokens already in the cache.
        end: int32 [1], position + tokens.
        cos: Rotary cosines, [1, 1, n, D].
        sin: Rotary sines with the sign of the rotation, [1, 1, n, D].
        mask: bool [1, 1, group * n, ctx], true where a query may look.
    """

    tokens: int
    position: Var
    end: Var
    cos: Var
    sin: Var
    mask: Var


class AttentionBuilder:
    """Adds the attention of all layers to the functions of the decoder package.

    Args:
        config: Dimensions.
        source: Canonical names.
        settings: Sequence lengths.
        repairs: Which layers' scores are not fused.
        context_length: Tokens the cache holds.
        ops: Adds operations to the function under construction.
    """

    def __init__(
        self,
        config: DecoderConfig,
        source: MixedSource,
        settings: CoreMLSettings,
        repairs: RepairSettings,
        context_length: int,
        ops: Ops,
    ) -> None:
        self.config = config
        self.source = source
        self.settings = settings
        self.repairs = repairs
        self.context_length = context_length
        self.ops = ops

    def step(self, tokens: int, x: Var, position: Var) -> Step:
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
        return Step(tokens, position, end, cos, sin, mask)

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Rotary cosines and sines, float64 [ctx, D / 2] each."""
        return rotary_tables(self.config, self.context_length)

    def _rotary_rows(self, part: str, tokens: int, position: Var, end: Var) -> Var:
        """Rows [position, end) of a rotary table, [1, 1, n, D]."""
        head_dim, (cos, sin) = self.config.head_dim, self._tables
        # A rotated pair is (x1 cos - x2 sin, x2 cos + x1 sin): the minus lies in the table.
        halves = [cos, cos] if part == "cos" else [-sin, sin]
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

    @cached_property
    def _rotary_columns(self) -> np.ndarray:
        """Cosines and below them sines of all positions, float32 [1, 1, D, ctx]."""
        return np.concatenate([table.T for table in self._tables])[None, None].astype(np.float32)

    def attend(self, i: int, x: Var, step: Step, cache: Cache) -> Var:
        """Attention of layer `i` without its output projection; [1, n, hidden] -> [1, n, heads * D]."""
        config, n = self.config, step.tokens
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

        def name(part: str) -> str:
            return decoder_op(i, part)

        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        parts = mb.split(x=self._packed(i, x), split_sizes=widths, axis=-1, name=name("qkv_split"))
        query, key, value = (
            mb.transpose(
                x=mb.reshape(x=part, shape=[1, n, -1 if n > 0 else count, head_dim], name=name(f"{p}_heads")),
                perm=[0, 2, 1, 3],
                name=name(f"{p}_transposed"),
            )
            for p, part, count in zip("qkv", parts, (heads, kv_heads, kv_heads), strict=True)
        )
        query, key = (
            self._rotate(name(p), part, step.cos, step.sin) for p, part in (("q", query), ("k", key))
        )
        keys, values = cache.append(i, key, value, step.position, step.end)
        # Queries that share a key head stand in its rows, so keys and values need no copies.
        group = heads // kv_heads
        query = mb.reshape(
            x=query, shape=[1, kv_heads, group * n if n > 0 else -1, head_dim], name=name("q_grouped")
        )
        if self.repairs.has_float32_scores(i):
            mixed = self._mixed_in_float32(i, query, keys, values, step.mask)
        else:
            mixed = self.ops.op(
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

    def _packed(self, i: int, x: Var) -> Var:
        """Queries, keys and values of one product; keys without bias where it is kept apart."""
        projections = [f"decoder.layers.{i}.self_attn.{p}_proj" for p in "qkv"]
        biases: list[AnyWeight] = [self.source[f"{p}.bias"] for p in projections]
        if i in self.repairs.separate_key_bias:
            shape = biases[1].shape
            biases[1] = computed(shape, "float32", lambda: np.zeros(shape))
        return self.ops.linear(
            decoder_op(i, "qkv"), x, [self.source[f"{p}.weight"] for p in projections], biases
        )

    def _rotate(self, name: str, x: Var, cos: Var, sin: Var, dtype: FloatName | None = None) -> Var:
        """The pairs of [1, heads, n, D], turned as the tables say."""
        ops = self.ops
        first, second = mb.split(x=x, num_splits=2, axis=-1, name=f"{name}_halves")
        swapped = mb.concat(values=[second, first], axis=-1, name=f"{name}_swapped")
        straight = ops.op("mul", f"{name}_cos", dtype, x=x, y=cos)
        crossed = ops.op("mul", f"{name}_sin", dtype, x=swapped, y=sin)
        return ops.op("add", f"{name}_rotated", dtype, x=straight, y=crossed)

    def _mixed_in_float32(self, i: int, query: Var, keys: Var, values: Var, mask: Var) -> Var:
        """softmax(q k^T / sqrt(D)) v, one operation after the other; only the last is not float32."""

        def op(kind: str, part: str, **arguments: Any) -> Var:  # noqa: ANN401
            return self.ops.op(kind, decoder_op(i, part), "float32", **arguments)

        if i in self.repairs.separate_key_bias:
            products = op("matmul", "attn_products", x=query, y=keys, transpose_y=True)
            scores = op("add", "attn_scores", x=products, y=self._bias_scores(i, query))
        else:
            scores = op("matmul", "attn_scores", x=query, y=keys, transpose_y=True)
        scaled = op("mul", "attn_scaled", x=scores, y=scalar("float32", self.config.head_dim**-0.5))
        masked = op("select", "attn_masked", cond=mask, a=scaled, b=scalar("float32", _HIDDEN))
        shares = op("softmax", "attn_weights", x=masked, axis=-1)
        return self.ops.op("matmul", decoder_op(i, "attn"), x=shares, y=values)

    def _bias_scores(self, i: int, query: Var) -> Var:
        """What the rotated bias of the keys adds to the scores, float32 [1, kv_heads, group * n, ctx].

        With pairs as complex numbers, q . R_p b is the real part of conj(q) b e^(ip), so the query is turned
        back by b once and multiplied by the cosines and sines of all positions, which all layers share.
        """
        weights = self.ops.weights
        bias = float_weight(self.source, f"decoder.layers.{i}.self_attn.k_proj.bias").array()
        first, second = np.split(bias.reshape(1, -1, 1, self.config.head_dim), 2, -1)
        straight, crossed = (
            weights.constant(
                decoder_op(i, f"key_bias_{part}"), "float32", "float32", np.concatenate(halves, -1)
            )
            for part, halves in (("straight", [first, first]), ("crossed", [second, -second]))
        )
        turned = self._rotate(
            decoder_op(i, "bias"), self.ops.cast(query, "float32"), straight, crossed, "float32"
        )
        columns = weights.constant("rotary_columns", "float32", "float32", self._rotary_columns)
        return self.ops.op("matmul", decoder_op(i, "bias_scores"), "float32", x=turned, y=columns)
