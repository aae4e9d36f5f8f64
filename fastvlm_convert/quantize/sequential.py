"""Solve layers in the order in which they run, each on what the quantized layers before it give.

All samples go through a block side by side. A layer that is to be solved waits for its input, collects its
Hessian, is solved, takes its new weights and lets the samples pass: so one forward pass serves all layers,
and of the model no more than a block is in memory. Finished layers are kept in files, from which an
interrupted run goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastvlm_convert.model.chain import Chain
from fastvlm_convert.quantize.answers import Answered, TokenBatch, token_batch
from fastvlm_convert.quantize.gptq import gptq
from fastvlm_convert.quantize.palettes import palettize
from fastvlm_convert.quantize.search import quantize_affine
from fastvlm_convert.quantize.targets import Moments, aimed, moments_of, shifted_bias
from fastvlm_convert.recipe import CalibrationSettings
from fastvlm_convert.weights.plan import LayerPlan
from fastvlm_convert.weights.quantized import AnyWeight
from fastvlm_convert.weights.schemes import AffineScheme, QuantizedMatrix
from fastvlm_convert.weights.store import load_layer, save_layer

OnProgress = Callable[[float], None]

MAX_ACTIVATION_BYTES = 512 << 20  # of the widest activation of a block, over the samples that solve it
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers with one input


@dataclass(frozen=True)
class Task:
    """What is to be solved, and with what.

    Attributes:
        reference: The float model.
        chain: The same with dequantized integers where those are found without data.
        plans: Layer -> its plan, of those to be solved.
        settings: How data is used.
        answered: The samples.
        token_weights: Layer -> weight of every token, float32 [samples, tokens]; empty weighs all alike.
        folder: Where finished layers are kept.
    """

    reference: Chain
    chain: Chain
    plans: Mapping[str, LayerPlan]
    settings: CalibrationSettings
    answered: Answered
    token_weights: Mapping[str, Tensor]
    folder: Path


@dataclass(frozen=True)
class Solved:
    """All layers solved.

    Attributes:
        weights: Canonical name -> weight, of the layers and of the floats that solving them changed.
        hidden: The residual stream that predicts the answers' tokens, float32 [n, hidden].
    """

    weights: dict[str, AnyWeight]
    hidden: Tensor


@dataclass(frozen=True)
class _States:
    """Where the samples are: in the quantized model and in the float one, [samples, ...] each."""

    quantized: Tensor
    reference: Tensor


@torch.no_grad()
def solve(task: Task, on_progress: OnProgress = lambda share: None) -> Solved:
    """Solve every layer of a task.

    Args:
        task: The layers and the data.
        on_progress: Called with the share that is done, 0..1.
    """
    chain, found = task.chain, dict[str, AnyWeight]()
    vision = chain.vision_blocks() if any(not n.startswith("decoder.") for n in task.plans) else []
    decoder = chain.decoder_blocks()
    total = len(vision) + len(decoder)
    features = torch.from_numpy(task.answered.features)
    states = _States(features, features)
    if vision:
        pixels = torch.from_numpy(task.answered.pixel_values)
        states = _States(pixels, pixels)
        for done, block in enumerate(vision):
            states = _through(task, block, states, None, found)
            on_progress((done + 1) / total)
    samples = task.answered.samples
    batch = token_batch(samples, states.quantized, chain.embed)
    states = _States(batch.embeds, token_batch(samples, states.reference, task.reference.embed).embeds)
    for done, block in enumerate(decoder):
        states = _through(task, block, states, batch, found)
        on_progress((len(vision) + done + 1) / total)
    return Solved(found, states.quantized[batch.answers])


def _through(
    task: Task, block: str, states: _States, batch: TokenBatch | None, found: dict[str, AnyWeight]
) -> _States:
    """Solve a block's layers while as many samples as fit go through it; then the others follow."""
    module, reference = task.chain.load(block), task.reference.load(block)
    layers = {f"{block}.{n}": layer for n, layer in module.named_modules() if f"{block}.{n}" in task.plans}
    shared = _sharing(layers)
    fitting = _fitting(task.chain, module, states.quantized)
    inputs: dict[str, Tensor] = {}
    hooks = [
        reference.get_submodule(first.removeprefix(f"{block}.")).register_forward_pre_hook(
            lambda _m, given, first=first: inputs.__setitem__(first, given[0])
        )
        for first in shared
    ]
    expected = _run(task.chain, reference, states.reference, fitting, hooks)
    hooks = [
        layers[first].register_forward_pre_hook(
            _Solver(task, {name: layers[name] for name in members}, inputs, first, batch, found)
        )
        for first, members in shared.items()
    ]
    return _States(_run(task.chain, module, states.quantized, fitting, hooks), expected)


def _run(
    chain: Chain, module: nn.Module, x: Tensor, fitting: int, hooks: Sequence[RemovableHandle]
) -> Tensor:
    """The first samples pass with hooks in place, the others without, as many at a time."""
    first, *rest = torch.split(x, fitting)
    parts = [chain.run(module, first)]
    for hook in hooks:
        hook.remove()
    return torch.cat([*parts, *(chain.run(module, part) for part in rest)])


def _sharing(layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Layers by the first of those that share their input."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        stem, _, last = name.rpartition(".")
        first = next((group[0] for group in TOGETHER if last in group), last)
        groups.setdefault(f"{stem}.{first}", []).append(name)
    return {members[0]: members for members in groups.values()}


def _fitting(chain: Chain, module: nn.Module, x: Tensor) -> int:
    """Samples whose widest activation in a block stays below the limit; at least one."""
    widest = 0

    def measure(_m: nn.Module, _i: object, y: Tensor) -> None:
        nonlocal widest
        widest = max(widest, 4 * y.numel())

    hooks = [layer.register_forward_hook(measure) for layer in module.modules() if not list(layer.children())]
    chain.run(module, x[:1])
    for hook in hooks:
        hook.remove()
    return min(len(x), max(1, MAX_ACTIVATION_BYTES // max(widest, 1)))


class _Solver:
    """Solves the layers that share an input when that input comes."""

    def __init__(
        self,
        task: Task,
        layers: Mapping[str, nn.Module],
        reference: Mapping[str, Tensor],
        first: str,
        batch: TokenBatch | None,
        found: dict[str, AnyWeight],
    ) -> None:
        self._task = task
        self._layers = layers
        self._reference = reference
        self._first = first
        self._batch = batch
        self._found = found

    def __call__(self, _module: nn.Module, given: tuple[Tensor]) -> None:
        missing = [name for name in self._layers if not self._path(name).is_file()]
        if missing:
            moments = self._moments(given[0])
            for name in missing:
                self._solve(name, moments)
        for name in self._layers:
            self._take(name)

    def _path(self, name: str) -> Path:
        return self._task.folder / f"{name}.safetensors"

    def _solve(self, name: str, moments: Moments) -> None:
        weight, bias = (getattr(self._layers[name], part) for part in ("weight", "bias"))
        original = weight.reshape(len(weight), -1).numpy()
        plan = self._task.plans[name]
        matrix = _rounded(aimed(original, moments), moments.hessian, plan, self._task.settings)
        floats = {}
        if bias is not None:
            rounded = matrix.dequantized()
            floats[f"{name}.bias"] = shifted_bias(bias.numpy(), original, rounded, moments)
        save_layer(self._path(name), matrix, floats)

    def _take(self, name: str) -> None:
        """Give a layer what its file holds."""
        plan, layer = self._task.plans[name], self._layers[name]
        assert plan.scheme is not None
        weight, floats = load_layer(self._path(name), plan.shape, plan.scheme)
        self._found |= {f"{name}.weight": weight, **floats}
        layer.weight = nn.Parameter(torch.from_numpy(weight.dense().array()), False)
        for bias in floats.values():
            layer.bias = nn.Parameter(torch.from_numpy(bias.array()), False)

    def _moments(self, x: Tensor) -> Moments:
        rows, reference = (_tokens(inputs).numpy() for inputs in (x, self._reference[self._first]))
        return moments_of(reference, rows, None if self._batch is None else self._weights(len(x)))

    def _weights(self, count: int) -> np.ndarray:
        """Importance of the tokens of the first samples, float32 [count * tokens]."""
        assert self._batch is not None
        weights = self._batch.real[:count].float()
        if self._task.token_weights:
            weights *= torch.stack([self._task.token_weights[name][:count] for name in self._layers]).sum(0)
        return weights.reshape(-1).numpy()


def _tokens(x: Tensor) -> Tensor:
    """[tokens, columns] of all samples; a 1x1 convolution sees its channels at every place."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).reshape(
        -1, x.shape[1] if x.ndim == 4 else x.shape[-1]
    )


def _rounded(
    weight: np.ndarray, hessian: np.ndarray, plan: LayerPlan, settings: CalibrationSettings
) -> QuantizedMatrix:
    if isinstance(plan.scheme, AffineScheme):
        if plan.solver == "gptq":
            return gptq(weight, hessian, plan.scheme, damping=settings.damping)
        return quantize_affine(weight, plan.scheme, np.diag(hessian).astype(np.float32))
    assert plan.scheme is not None
    if plan.solver == "gptq":
        return palettize(weight, plan.scheme, hessian=hessian, damping=settings.damping)
    return palettize(weight, plan.scheme, np.diag(hessian))
