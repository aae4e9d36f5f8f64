"""Attention."""

import math

import torch
from torch.nn import functional

from fastvlm_convert.mil.ops.activation import softmax
from fastvlm_convert.mil.ops.table import Limit, Rounding, Tensor, op


@op("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    limit: Limit,
    attn_mask: Tensor | None = None,
    rounded: Rounding = None,
) -> Tensor:
    """softmax(query @ key^T / sqrt(width) + mask) @ value.

    In float16 each of these steps is rounded, the scores before they are divided among them.

    Args:
        query: [batch, *, targets, width].
        key: [batch, *, sources, width].
        value: [batch, *, sources, value width].
        limit: Bounds the scores.
        attn_mask: Added to the scores, or bool: false means not to look there.
        rounded: Rounds to float16.
    """
    limit.check([*query.shape[:-1], value.shape[-1]])
    if rounded is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask)
    scores = rounded(query @ key.mT)
    scores = rounded(scores / math.sqrt(query.shape[-1]))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = rounded(scores + attn_mask)
    return rounded(softmax(scores, -1, rounded)) @ value
