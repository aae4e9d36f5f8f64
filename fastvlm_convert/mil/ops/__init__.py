"""All operations, one module a family; importing this fills `table.OPS` and `table.CONSTEXPRS`."""

from fastvlm_convert.mil.ops import (
    activation,
    attention,
    classify,
    constexpr,
    conv,
    elementwise,
    gather,
    image,
    lists,
    norm,
    pool,
    product,
    quantize,
    random,
    ranking,
    recurrent,
    reduction,
    resize,
    shape,
    slices,
    state,
)

__all__ = [
    "activation", "attention", "classify", "constexpr", "conv", "elementwise", "gather", "image", "lists",
    "norm", "pool", "product", "quantize", "random", "ranking", "recurrent", "reduction", "resize", "shape",
    "slices", "state",
]  # fmt: skip
