"""Arithmetic, comparison and rounding, element by element."""

from collections.abc import Callable

import torch

from fastvlm_convert.mil.ops.table import Limit, Rounding, Target, Tensor, broadcast, in_half, op

# A result this small needs no look; most are not even close.
_SMALL = 1 << 28

Unary = Callable[[Tensor], Tensor]
Binary = Callable[[Tensor, Tensor], Tensor]

_UNARY: dict[str, Unary] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "round": torch.round,  # half to even
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}

_BINARY: dict[str, Binary] = {
    "add": torch.add,
    "equal": torch.eq,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "sub": torch.sub,
}


def _unary(function: Unary) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        return function(x)

    return compute


def _binary(function: Binary) -> Callable[[Tensor, Tensor, Limit], Tensor]:
    def compute(x: Tensor, y: Tensor, limit: Limit) -> Tensor:
        check_broadcast(x, y, limit)
        return function(x, y)

    return compute


def check_broadcast(x: Tensor, y: Tensor, limit: Limit) -> None:
    """Refuse a result that is far larger than its inputs.

    Raises:
        ValueError: The result has more elements than it may.
    """
    if x.numel() * y.numel() > _SMALL and x.shape != y.shape:
        limit.check(broadcast(x.shape, y.shape))


for _name, _function in _UNARY.items():
    op(_name)(_unary(_function))
for _name, _function_of_two in _BINARY.items():
    op(_name)(_binary(_function_of_two))


def _wide(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Integers as int64: the smallest int32 divided by -1 stops the process."""
    return (x.long(), y.long()) if not x.is_floating_point() and not y.is_floating_point() else (x, y)


@op("floor_div")
def floor_div(x: Tensor, y: Tensor, limit: Limit) -> Tensor:
    """Division rounded down."""
    check_broadcast(x, y, limit)
    a, b = _wide(x, y)
    return torch.div(a, b, rounding_mode="floor").to(x.dtype)


@op("real_div")
def real_div(x: Tensor, y: Tensor, limit: Limit) -> Tensor:
    """Division; integers give an integer, rounded down."""
    check_broadcast(x, y, limit)
    return torch.div(x, y) if x.is_floating_point() else floor_div(x, y, limit)


@op("mod")
def mod(x: Tensor, y: Tensor, limit: Limit) -> Tensor:
    """What remains of a division rounded down: it has the sign of y."""
    check_broadcast(x, y, limit)
    a, b = _wide(x, y)
    return torch.remainder(a, b).to(x.dtype)


@op("identity", moves=True)
def identity(x: Tensor) -> Tensor:
    """The input itself."""
    return x


@op("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4, rounded: Rounding = None) -> Tensor:
    """1 / (x + epsilon)."""
    return torch.reciprocal(_shifted(x, epsilon, rounded))


@op("log")
def log(x: Tensor, epsilon: float = 1e-45, rounded: Rounding = None) -> Tensor:
    """The natural logarithm of x + epsilon."""
    return torch.log(_shifted(x, epsilon, rounded))


@op("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12, rounded: Rounding = None) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return torch.rsqrt(_shifted(x, epsilon, rounded))


def _shifted(x: Tensor, epsilon: float, rounded: Rounding) -> Tensor:
    if not epsilon:
        return x
    return in_half(rounded, x + epsilon)


@op("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    """X kept between alpha and beta."""
    return torch.clamp(x, alpha, beta)


@op("threshold")
def threshold(x: Tensor, alpha: float) -> Tensor:
    """The larger of x and alpha."""
    return torch.clamp(x, min=alpha)


@op("cast", moves=True)
def cast(x: Tensor, dtype: str, target: Target, rounded: Rounding = None) -> Tensor:
    """X in another type. Floats become float16 only where arithmetic is in float16."""
    del dtype  # the declared type of the result says the same
    return convert(x, target, rounded)


def convert(x: Tensor, target: Target, rounded: Rounding) -> Tensor:
    """A tensor as it is held in another declared type.

    Args:
        x: float32, int32 or bool.
        target: The declared type.
        rounded: Rounds to float16, or None to leave float32 as it is.
    """
    if target.is_float:
        return in_half(rounded, x.float())
    if target.numpy.kind == "b":
        return x != 0
    if x.is_floating_point():
        x = torch.nan_to_num(x.double()).clamp(-(2.0**31), 2.0**31 - 1)
    return wrap(x.to(torch.int32), target)


def wrap(x: Tensor, target: Target) -> Tensor:
    """Integers in a narrower type: only its lowest bits are kept."""
    if target.bits >= 32:
        return x
    low = x & ((1 << target.bits) - 1)
    return low if not target.is_signed else low - ((low >> (target.bits - 1)) << target.bits)


@op("select")
def select(cond: Tensor, a: Tensor, b: Tensor, limit: Limit) -> Tensor:
    """A where cond holds, else b."""
    check_broadcast(a, b, limit)
    check_broadcast(cond, a, limit)
    check_broadcast(cond, b, limit)
    return torch.where(cond != 0, a, b)
