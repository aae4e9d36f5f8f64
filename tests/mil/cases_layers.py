"""Cases of layers: normalization, products, attention, recurrence, quantization, loops, lists."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from coremltools.converters.mil import Builder as mb  # noqa: N813

from tests.mil.cases_basic import IMAGE, X, integers, normal, uniform
from tests.mil.cases_conv import BIAS, PICTURE, t
from tests.mil.programs import Case

C = IMAGE.shape[1]
MEAN, VARIANCE, GAMMA, BETA = normal(C), uniform(0.5, 2, C), normal(C), normal(C)

NORMS = [
    Case(
        "layer_norm",
        lambda x: mb.layer_norm(x=x, axes=[-2, -1], gamma=GAMMA2, beta=BETA2, epsilon=1e-3),
        (X,),
        lambda x: F.layer_norm(x, (3, 4), t(GAMMA2), t(BETA2), 1e-3),
    ),
    Case(
        "layer_norm",
        lambda x: mb.layer_norm(x=x, axes=[1], gamma=GAMMA, beta=BETA, epsilon=1e-3),
        (IMAGE,),
        lambda x: F.layer_norm(x.movedim(1, -1), (C,), t(GAMMA), t(BETA), 1e-3).movedim(-1, 1),
        label="channels",
    ),
    Case(
        "batch_norm",
        lambda x: mb.batch_norm(x=x, mean=MEAN, variance=VARIANCE, gamma=GAMMA, beta=BETA, epsilon=1e-3),
        (IMAGE,),
        lambda x: F.batch_norm(x, t(MEAN), t(VARIANCE), t(GAMMA), t(BETA), eps=1e-3),
    ),
    Case(
        "instance_norm",
        lambda x: mb.instance_norm(x=x, gamma=GAMMA, beta=BETA, epsilon=1e-3),
        (IMAGE,),
        lambda x: F.instance_norm(x, weight=t(GAMMA), bias=t(BETA), eps=1e-3),
    ),
    Case(
        "l2_norm",
        lambda x: mb.l2_norm(x=x, epsilon=1e-3),
        (IMAGE,),
        lambda x: x / (x.square().sum((1, 2, 3), keepdim=True) + 1e-3).sqrt(),
    ),
    Case(
        "local_response_norm",
        lambda x: mb.local_response_norm(x=x, size=3, alpha=0.1, beta=0.7, k=1.5),
        (PICTURE,),
        lambda x: F.local_response_norm(x, 3, 0.1, 0.7, 1.5),
    ),
]
GAMMA2, BETA2 = normal(3, 4), normal(3, 4)

MATRIX = normal(5, 4)
Q, K, V = normal(2, 3, 4, 8), normal(2, 3, 6, 8), normal(2, 3, 6, 8)
MASK = normal(1, 1, 4, 6)

PRODUCTS = [
    Case(
        "linear",
        lambda x: mb.linear(x=x, weight=MATRIX, bias=BIAS[:5]),
        (X,),
        lambda x: F.linear(x, t(MATRIX), t(BIAS[:5])),
    ),
    Case("matmul", lambda x, y: mb.matmul(x=x, y=y), (X, normal(2, 4, 5)), torch.matmul),
    Case(
        "matmul",
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        (X, normal(1, 6, 3)),
        lambda x, y: x.mT @ y.mT,
        label="transposed",
    ),
    Case(
        "matmul",
        lambda x, y: mb.matmul(x=x, y=y),
        (integers(-9, 9, 2, 3), integers(-9, 9, 3, 2)),
        torch.matmul,
        label="int",
    ),
    Case(
        "einsum",
        lambda x, y: mb.einsum(values=(x, y), equation="bnhc,bchw->bnhw"),
        (normal(2, 3, 4, 5), normal(2, 5, 4, 6)),
        lambda x, y: torch.einsum("bnhc,bchw->bnhw", x, y),
    ),
    Case(
        "scaled_dot_product_attention",
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=MASK),
        (Q, K, V),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, t(MASK)),
        label="mask",
    ),
    Case(
        "scaled_dot_product_attention",
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=MASK > 0),
        (Q, K, V),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, t(MASK > 0)),
        label="bool-mask",
    ),
    Case(
        "scaled_dot_product_attention",
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        (Q, K, V),
        F.scaled_dot_product_attention,
    ),
]

SCALES, POINTS = uniform(0.01, 0.1, 3), np.array([3, -2, 7], np.int8)

QUANTIZED = [
    Case(
        "quantize",
        lambda x: mb.quantize(input=x, scale=SCALES, zero_point=POINTS, axis=1, output_dtype="int8"),
        (X,),
        lambda x: torch.quantize_per_channel(x, t(SCALES), t(POINTS), 1, torch.qint8).int_repr(),
    ),
    Case(
        "quantize",
        lambda x: mb.quantize(
            input=x, scale=np.float32(0.02), zero_point=np.uint8(100), output_dtype="uint8"
        ),
        (X,),
        lambda x: torch.quantize_per_tensor(x, 0.02, 100, torch.quint8).int_repr(),
        label="uint8",
    ),
    Case(
        "dequantize",
        lambda x: mb.dequantize(
            input=mb.quantize(input=x, scale=SCALES, zero_point=POINTS, axis=1, output_dtype="int8"),
            scale=SCALES,
            zero_point=POINTS,
            axis=1,
        ),
        (X,),
        lambda x: torch.fake_quantize_per_channel_affine(x, t(SCALES), t(POINTS).int(), 1, -128, 127),
    ),
]

# recurrent layers: coremltools' order of gates against torch's
H = 3
RNN, GRU, LSTM = (torch.nn.RNN(4, H), torch.nn.GRU(4, H), torch.nn.LSTM(4, H, bidirectional=True))
SEQUENCE, H0, H2, C2 = normal(5, 2, 4), normal(2, H), normal(2, 2 * H), normal(2, 2 * H)


def weights(layer, name, order, back=""):
    parts = getattr(layer, f"{name}_l0{back}").detach().numpy().reshape(len(order), H, -1)
    return (
        np.concatenate([parts[i] for i in order]).squeeze(-1)
        if "bias" in name
        else np.concatenate([parts[i] for i in order])
    )


def lstm_side(suffix, back):
    order = [0, 1, 3, 2]  # torch: input, forget, cell, output
    bias = weights(LSTM, "bias_ih", order, back) + weights(LSTM, "bias_hh", order, back)
    return {
        f"weight_ih{suffix}": weights(LSTM, "weight_ih", order, back),
        f"weight_hh{suffix}": weights(LSTM, "weight_hh", order, back),
        f"bias{suffix}": bias,
    }


def _lstm_expected(x, h, c):
    def both(v):
        return torch.stack(v.chunk(2, -1))

    y, (h, c) = LSTM(x, (both(h), both(c)))
    return tuple(v.detach() for v in (y, torch.cat(tuple(h), -1), torch.cat(tuple(c), -1)))


def _detached(layer):
    return lambda x, h: tuple(v.detach() for v in (layer(x, h[None])[0], layer(x, h[None])[1][0]))


RECURRENT = [
    Case(
        "rnn",
        lambda x, h: mb.rnn(
            x=x,
            initial_h=h,
            weight_ih=weights(RNN, "weight_ih", [0]),
            weight_hh=weights(RNN, "weight_hh", [0]),
            bias=weights(RNN, "bias_ih", [0]) + weights(RNN, "bias_hh", [0]),
            output_sequence=True,
            activation="tanh",
        ),
        (SEQUENCE, H0),
        _detached(RNN),
    ),
    Case(
        "gru",
        lambda x, h: mb.gru(
            x=x,
            initial_h=h,
            weight_ih=weights(GRU, "weight_ih", [0, 1, 2]),
            weight_hh=weights(GRU, "weight_hh", [0, 1, 2]),
            bias=weights(GRU, "bias_hh", [0, 1, 2]),
            input_bias=weights(GRU, "bias_ih", [0, 1, 2]),
            reset_after=True,
            output_sequence=True,
        ),
        (SEQUENCE, H0),
        _detached(GRU),
    ),
    Case(
        "lstm",
        lambda x, h, c: mb.lstm(
            x=x,
            initial_h=h,
            initial_c=c,
            direction="bidirectional",
            output_sequence=True,
            **lstm_side("", ""),
            **lstm_side("_back", "_reverse"),
        ),
        (SEQUENCE, H2, C2),
        _lstm_expected,
    ),
]


def _looped(x, n):
    for i in range(int(n)):
        x = x * 2 + i
    return x, n


LOOPS = [
    Case(
        "while_loop",
        lambda x, n: mb.while_loop(
            _cond=lambda i, y, m: mb.less(x=i, y=m),
            _body=lambda i, y, m: (
                mb.add(x=i, y=1),
                mb.add(x=mb.mul(x=y, y=2.0), y=mb.cast(x=i, dtype="fp32")),
                mb.identity(x=m),
            ),
            loop_vars=(mb.fill(shape=[1], value=0), x, n),
        )[1:],
        (X, np.array([3], np.int32)),
        _looped,
    ),
    *(
        Case(
            "cond",
            lambda x, n: mb.cond(
                pred=mb.squeeze(x=mb.greater(x=n, y=0)),
                _true_fn=lambda x=x: mb.mul(x=x, y=2.0),
                _false_fn=lambda x=x: mb.sub(x=x, y=1.0),
            ),
            (X, np.array([sign], np.int32)),
            lambda x, n: x * 2 if n > 0 else x - 1,
            label=str(sign),
        )
        for sign in (1, -1)
    ),
]


def _listed(x):
    ls = mb.make_list(init_length=3, elem_shape=(4,))
    ls = mb.list_write(ls=ls, index=1, value=x)
    ls = mb.list_scatter(
        ls=ls, indices=[0, 3], value=mb.stack(values=[mb.mul(x=x, y=2.0), mb.mul(x=x, y=3.0)], axis=0)
    )
    gathered = mb.list_gather(ls=ls, indices=[3, 1, 2, 0])
    return mb.list_read(ls=ls, index=0), mb.list_length(ls=ls), gathered


def _listed_expected(x):
    return 2 * x, np.array(4), torch.stack([3 * x, x, 0 * x, 2 * x])


def _listed_symbolic(x):
    """Elements of a shape that is known only when it runs: what is never written is zero in that shape."""
    ls = mb.make_list(init_length=2, elem_shape=("rows", np.int32(4)))
    ls = mb.list_write(ls=ls, index=2, value=x)
    return mb.list_gather(ls=ls, indices=[2, 0]), mb.list_length(ls=ls)


LISTS = [
    *(
        Case(op, _listed, (normal(4),), _listed_expected)
        for op in ("make_list", "list_write", "list_read", "list_length", "list_scatter", "list_gather")
    ),
    Case(
        "make_list",
        _listed_symbolic,
        (normal(3, 4),),
        lambda x: (torch.stack([x, 0 * x]), np.array(3)),
        label="symbolic",
    ),
]

CASES = [*NORMS, *PRODUCTS, *QUANTIZED, *RECURRENT, *LOOPS, *LISTS]
