"""Cases of element-wise operations, activations and reductions."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from coremltools.converters.mil import Builder as mb  # noqa: N813

from tests.mil.programs import Case

RNG = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def uniform(low: float, high: float, *shape: int) -> np.ndarray:
    return RNG.uniform(low, high, shape).astype(np.float32)


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int32)


X = normal(2, 3, 4)
UNIT = uniform(-0.95, 0.95, 2, 3, 4)
POSITIVE = uniform(0.1, 4, 2, 3, 4)
BOOLS = RNG.random((2, 3, 4)) < 0.5
IMAGE = normal(2, 3, 5, 6)

UNARY = {
    "abs": (X, torch.abs), "acos": (UNIT, torch.acos), "asin": (UNIT, torch.asin), "atan": (X, torch.atan),
    "atanh": (UNIT, torch.atanh), "ceil": (X * 3, torch.ceil), "cos": (X, torch.cos), "cosh": (X, torch.cosh),
    "erf": (X, torch.erf), "exp": (X, torch.exp), "exp2": (X, torch.exp2), "floor": (X * 3, torch.floor),
    "round": (X * 3, torch.round), "sign": (X, torch.sign), "sin": (X, torch.sin), "sinh": (X, torch.sinh),
    "sqrt": (POSITIVE, torch.sqrt), "square": (X, torch.square), "tan": (UNIT, torch.tan),
    "tanh": (X, torch.tanh), "logical_not": (BOOLS, torch.logical_not), "identity": (X, lambda x: x),
    "relu": (X, F.relu), "relu6": (X * 4, F.relu6), "sigmoid": (X, torch.sigmoid), "silu": (X, F.silu),
    "softplus": (X * 20, F.softplus), "softsign": (X, F.softsign),
}  # fmt: skip

BINARY = {
    "add": (X, X[:1], torch.add), "sub": (X, X[:, :1], torch.sub), "mul": (X, X[0], torch.mul),
    "real_div": (X, POSITIVE, torch.div), "maximum": (X, X[:1], torch.maximum),
    "minimum": (X, X[:1], torch.minimum), "pow": (POSITIVE, X, torch.pow),
    "floor_div": (X * 9, POSITIVE, torch.floor_divide), "mod": (X * 9, POSITIVE, torch.remainder),
    "equal": (np.round(X), np.round(X[:1]), torch.eq), "not_equal": (np.round(X), np.round(X[:1]), torch.ne),
    "greater": (X, X[:1], torch.gt), "greater_equal": (X, X[:1], torch.ge), "less": (X, X[:1], torch.lt),
    "less_equal": (X, X[:1], torch.le), "logical_and": (BOOLS, BOOLS[:1], torch.logical_and),
    "logical_or": (BOOLS, BOOLS[:1], torch.logical_or), "logical_xor": (BOOLS, BOOLS[:1], torch.logical_xor),
}  # fmt: skip

A, B = integers(-20, 20, 12), integers(1, 7, 12) * np.array([1, -1] * 6, np.int32)


def _unary(name):
    return lambda x: getattr(mb, name)(x=x)


def _binary(name):
    return lambda x, y: getattr(mb, name)(x=x, y=y)


CASES = [Case(name, _unary(name), (x,), expected) for name, (x, expected) in UNARY.items()]
CASES += [
    Case(name, _binary(name), (x, np.ascontiguousarray(y)), expected)
    for name, (x, y, expected) in BINARY.items()
]
CASES += [
    Case("floor_div", _binary("floor_div"), (A, B), lambda a, b: a.numpy() // b.numpy(), label="int"),
    Case("mod", _binary("mod"), (A, B), lambda a, b: np.mod(a.numpy(), b.numpy()), label="int"),
    Case("add", _binary("add"), (A, B), torch.add, label="int"),
    Case("inverse", lambda x: mb.inverse(x=x, epsilon=0.1), (POSITIVE,), lambda x: 1 / (x + 0.1)),
    Case("log", lambda x: mb.log(x=x, epsilon=0.1), (POSITIVE,), lambda x: torch.log(x + 0.1)),
    Case("rsqrt", lambda x: mb.rsqrt(x=x, epsilon=0.1), (POSITIVE,), lambda x: torch.rsqrt(x + 0.1)),
    Case("clip", lambda x: mb.clip(x=x, alpha=-0.3, beta=0.4), (X,), lambda x: x.clip(-0.3, 0.4)),
    Case("threshold", lambda x: mb.threshold(x=x, alpha=0.2), (X,), lambda x: x.clip(min=0.2)),
    Case("cast", lambda x: mb.cast(x=x, dtype="int32"), (X * 9,), lambda x: x.int(), label="int32"),
    Case("cast", lambda x: mb.cast(x=x, dtype="bool"), (A,), lambda x: x.bool(), label="bool"),
    Case("cast", lambda x: mb.cast(x=x, dtype="fp32"), (A,), lambda x: x.float(), label="float32"),
    Case(
        "cast",
        lambda x: mb.cast(x=x, dtype="uint8"),
        (np.abs(A),),
        lambda x: x.to(torch.uint8),
        label="uint8",
    ),
    Case("cast", lambda x: mb.cast(x=x, dtype="int8"), (A,), lambda x: x.to(torch.int8), label="int8"),
    Case(
        "select",
        lambda c, a, b: mb.select(cond=c, a=a, b=b),
        (BOOLS, X, X[:1]),
        lambda c, a, b: torch.where(c, a, b),
    ),
    # activations with parameters
    Case("leaky_relu", lambda x: mb.leaky_relu(x=x, alpha=0.1), (X,), lambda x: F.leaky_relu(x, 0.1)),
    Case("elu", lambda x: mb.elu(x=x, alpha=0.7), (X,), lambda x: F.elu(x, 0.7)),
    Case("gelu", lambda x: mb.gelu(x=x, mode="EXACT"), (X,), F.gelu, label="exact"),
    Case(
        "gelu",
        lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        (X,),
        lambda x: F.gelu(x, approximate="tanh"),
        label="tanh",
    ),
    Case(
        "gelu",
        lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        (X,),
        lambda x: x * torch.sigmoid(1.702 * x),
        label="sigmoid",
    ),
    Case(
        "prelu",
        lambda x: mb.prelu(x=x, alpha=np.array([0.1, 0.2, 0.3], np.float32)),
        (IMAGE,),
        lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3])),
    ),
    Case(
        "clamped_relu",
        lambda x: mb.clamped_relu(x=x, alpha=0.1, beta=0.8),
        (X,),
        lambda x: torch.where(x > 0, x, 0.1 * x).clip(max=0.8),
    ),
    Case(
        "thresholded_relu",
        lambda x: mb.thresholded_relu(x=x, alpha=0.5),
        (X,),
        lambda x: F.threshold(x, 0.5, 0.0),
    ),
    Case(
        "sigmoid_hard",
        lambda x: mb.sigmoid_hard(x=x, alpha=1 / 6, beta=0.5),
        (X * 4,),
        F.hardsigmoid,
    ),
    Case(
        "scaled_tanh",
        lambda x: mb.scaled_tanh(x=x, alpha=1.7, beta=0.6),
        (X,),
        lambda x: 1.7 * torch.tanh(0.6 * x),
    ),
    Case(
        "linear_activation",
        lambda x: mb.linear_activation(x=x, alpha=2.0, beta=-1.0),
        (X,),
        lambda x: 2 * x - 1,
    ),
    Case(
        "softplus_parametric",
        lambda x: mb.softplus_parametric(
            x=x, alpha=np.array([1, 2, 3], np.float32), beta=np.array([0.5, 1, 2], np.float32)
        ),
        (IMAGE,),
        lambda x: torch.stack(
            [a * F.softplus(b * x[:, i]) for i, (a, b) in enumerate(((1, 0.5), (2, 1.0), (3, 2.0)))], 1
        ),
    ),
    Case("softmax", lambda x: mb.softmax(x=x, axis=1), (X,), lambda x: F.softmax(x, 1)),
    # along axes
    Case("cumsum", lambda x: mb.cumsum(x=x, axis=1), (X,), lambda x: x.cumsum(1)),
    Case(
        "cumsum",
        lambda x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
        (X,),
        lambda x: x.flip(1).cumsum(1).flip(1) - x,
        label="exclusive-reverse",
    ),
    Case("reduce_argmax", lambda x: mb.reduce_argmax(x=x, axis=1), (X,), lambda x: x.argmax(1).int()),
    Case(
        "reduce_argmin",
        lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True),
        (X,),
        lambda x: x.argmin(-1, keepdim=True).int(),
    ),
    Case("reduce_sum", lambda x: mb.reduce_sum(x=x), (A,), lambda x: x.sum(), label="int-all"),
]

REDUCTIONS = {
    "reduce_sum": lambda x, a, k: x.sum(a, k), "reduce_mean": lambda x, a, k: x.mean(a, k),
    "reduce_max": lambda x, a, k: x.amax(a, k), "reduce_min": lambda x, a, k: x.amin(a, k),
    "reduce_l1_norm": lambda x, a, k: x.abs().sum(a, k),
    "reduce_l2_norm": lambda x, a, k: torch.linalg.vector_norm(x, 2, a, k),
    "reduce_sum_square": lambda x, a, k: (x * x).sum(a, k),
    "reduce_log_sum": lambda x, a, k: x.sum(a, k).log(), "reduce_log_sum_exp": torch.logsumexp,
    "reduce_prod": lambda x, a, k: torch.from_numpy(np.prod(x.numpy(), axis=tuple(a), keepdims=k)),
}  # fmt: skip


def _reduction(name, axes, keep):
    return lambda x: getattr(mb, name)(x=x, axes=axes, keep_dims=keep)


def _reduced(function, axes, keep):
    return lambda x: function(x, axes, keep)


CASES += [
    Case(
        name,
        _reduction(name, axes, keep),
        (POSITIVE,),
        _reduced(f, axes, keep),
        label=f"{axes}-{keep}",
        tolerance=3e-5,
    )
    for name, f in REDUCTIONS.items()
    for axes, keep in (([0, 2], True), ([-1], False))
]
