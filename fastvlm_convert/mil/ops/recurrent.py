"""Recurrent layers, one time step after the other."""

from collections.abc import Callable
from typing import Final

import torch

from fastvlm_convert.mil.ops.table import Tensor, op

_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "sigmoid_hard": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
    "tanh": torch.tanh,
    "softsign": torch.nn.functional.softsign,
}

_Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation '{name}'")
    return _ACTIVATIONS[name]


def _scan(
    x: Tensor, first: tuple[Tensor, ...], step: _Step, backward: bool, sequence: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run over x [steps, ...]; the first value of the state in all steps or the last, and the last state."""
    values = first
    seen = []
    for t in reversed(range(len(x))) if backward else range(len(x)):
        values = step(x[t], values)
        seen.append(values[0])
    if backward:
        seen.reverse()
    return torch.stack(seen) if sequence else values[0][None].clone(), values


def _is_backward(direction: str) -> bool:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"unknown direction '{direction}'")
    return direction == "reverse"


@op("rnn")
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """A plain recurrent layer: x [steps, batch, in], initial_h [batch, hidden]."""
    act = _activation(activation)
    inputs = x @ weight_ih.T + (0 if bias is None else bias)

    def step(given: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (act(given + before[0] @ weight_hh.T),)

    outputs, (last,) = _scan(inputs, (initial_h,), step, _is_backward(direction), output_sequence)
    return outputs, last


@op("gru")
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A gated recurrent layer; its weights hold the reset, update and new gates in this order."""
    gate, act = _activation(recurrent_activation), _activation(activation)
    inputs = x @ weight_ih.T + (0 if input_bias is None else input_bias)
    hidden = initial_h.shape[-1]
    recurrent = torch.zeros(3 * hidden) if bias is None else bias
    reset_w, update_w, new_w = torch.split(weight_hh, hidden)
    reset_b, update_b, new_b = torch.split(recurrent, hidden)

    def step(given: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = before
        reset_in, update_in, new_in = torch.split(given, hidden, -1)
        reset = gate(reset_in + h @ reset_w.T + reset_b)
        update = gate(update_in + h @ update_w.T + update_b)
        if reset_after:
            new = act(new_in + reset * (h @ new_w.T + new_b))
        else:
            new = act(new_in + (reset * h) @ new_w.T + new_b)
        return ((1 - update) * new + update * h,)

    outputs, (last,) = _scan(inputs, (initial_h,), step, _is_backward(direction), output_sequence)
    return outputs, last


@op("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A long short-term memory; its weights hold the input, forget, output and cell gates in this order."""
    names = (recurrent_activation, cell_activation, activation)

    def one_way(parts: tuple[Tensor | None, ...], h: Tensor, c: Tensor, backward: bool) -> tuple[Tensor, ...]:
        w_in, w_hidden, added, peek = parts
        if w_in is None or w_hidden is None:
            raise ValueError("a direction has no weights")
        inputs = x @ w_in.T + (0 if added is None else added)
        step = _lstm_step(w_hidden, peek, clip, names)
        outputs, (last_h, last_c) = _scan(inputs, (h, c), step, backward, output_sequence)
        return outputs, last_h, last_c

    ahead = (weight_ih, weight_hh, bias, peephole)
    if direction != "bidirectional":
        outputs, last_h, last_c = one_way(ahead, initial_h, initial_c, _is_backward(direction))
        return outputs, last_h, last_c
    back = (weight_ih_back, weight_hh_back, bias_back, peephole_back)
    (h1, h2), (c1, c2) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    made = zip(one_way(ahead, h1, c1, False), one_way(back, h2, c2, True), strict=True)
    outputs, last_h, last_c = (torch.cat(pair, -1) for pair in made)
    return outputs, last_h, last_c


def _lstm_step(
    weight: Tensor, peephole: Tensor | None, clip: float | None, names: tuple[str, str, str]
) -> _Step:
    gate, cell, act = (_activation(name) for name in names)
    hidden = weight.shape[1]
    peek_in, peek_forget, peek_out = (
        (0, 0, 0) if peephole is None else torch.split(peephole, hidden)
    )  # fmt: skip

    def step(given: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = before
        z_in, z_forget, z_out, z_cell = torch.split(given + h @ weight.T, hidden, -1)
        kept = gate(z_forget + peek_forget * c) * c
        c = kept + gate(z_in + peek_in * c) * cell(z_cell)
        if clip is not None:
            c = c.clamp(-clip, clip)
        return gate(z_out + peek_out * c) * act(c), c

    return step
