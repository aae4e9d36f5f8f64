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

from fastvlm_convert.model.chain import Chain
from fastvlm_convert.quantize.answers import Answered, TokenBatch, token_batch
from fastvlm_convert.quantize.feedback import hessian_of
from fastvlm_convert.quantize.gptq import gptq
from fastvlm_convert.quantize.palettes import palettize
from fastvlm_convert.quantize.search import quantize_affine
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
        chain: The model: floats where layers are to be solved, dequantized integers where they are found
            without data.
        plans: Layer -> its plan, of those to be solved.
        settings: How data is used.
        answered: The samples.
        token_weights: Layer -> weight of every token, float32 [samples, tokens]; empty weighs all alike.
        folder: Where finished layers are kept.
    """

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

    def count(done: int) -> None:
        on_progress(done / total)

    features = torch.from_numpy(task.answered.features)
    if vision:
        x = torch.from_numpy(task.answered.pixel_values)
        for done, block in enumerate(vision):
            x = _through(task, block, x, None, found)
            count(done + 1)
        features = x
    batch = token_batch(task.answered.samples, features, chain.embed)
    x = batch.embeds
    for done, block in enumerate(decoder):
        x = _through(task, block, x, batch, found)
        count(len(vision) + done + 1)
    return Solved(found, x[batch.answers])


def _through(
    task: Task, block: str, x: Tensor, batch: TokenBatch | None, found: dict[str, AnyWeight]
) -> Tensor:
    """Solve a block's layers while as many samples as fit go through it; then the others follow."""
    module = task.chain.load(block)
    layers = {f"{block}.{n}": layer for n, layer in module.named_modules() if f"{block}.{n}" in task.plans}
    fitting = _fitting(task.chain, module, x)
    hooks = [
        layer.register_forward_pre_hook(_Solver(task, module, block, members, layers, batch, found))
        for layer, members in _sharing(layers)
    ]
    parts = [task.chain.run(module, x[:fitting])]
    for hook in hooks:
        hook.remove()
    parts += (
        [task.chain.run(module, part) for part in torch.split(x[fitting:], fitting)]
        if fitting < len(x)
        else []
    )
    return torch.cat(parts)


def _sharing(layers: Mapping[str, nn.Module]) -> list[tuple[nn.Module, list[str]]]:
    """Layers by the input they share, with the one that sees it first."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        stem, _, last = name.rpartition(".")
        first = next((group[0] for group in TOGETHER if last in group), last)
        groups.setdefault(f"{stem}.{first}", []).append(name)
    return [(layers[members[0]], members) for members in groups.values()]


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
        module: nn.Module,
        block: str,
        members: Sequence[str],
        layers: Mapping[str, nn.Module],
        batch: TokenBatch | None,
        found: dict[str, AnyWeight],
    ) -> None:
        self._task = task
        self._module = module
        self._block = block
        self._members = members
        self._layers = layers
        self._batch = batch
        self._found = found

    def __call__(self, _module: nn.Module, given: tuple[Tensor]) -> None:
        missing = [name for name in self._members if not self._path(name).is_file()]
        if missing:
            hessian = self._hessian(given[0])
            for name in missing:
                weight = self._layers[name].weight
                assert isinstance(weight, Tensor)
                matrix = _solved(
                    weight.reshape(len(weight), -1).numpy(),
                    hessian,
                    self._task.plans[name],
                    self._task.settings,
                )
                save_layer(self._path(name), matrix, {})
        for name in self._members:
            self._take(name)

    def _path(self, name: str) -> Path:
        return self._task.folder / f"{name}.safetensors"

    def _take(self, name: str) -> None:
        """Give a layer the weights that its file holds."""
        plan = self._task.plans[name]
        assert plan.scheme is not None
        weight, floats = load_layer(self._path(name), plan.shape, plan.scheme)
        self._found[f"{name}.weight"] = weight
        self._found.update(floats)
        self._layers[name].weight = nn.Parameter(torch.from_numpy(weight.dense().array()), False)

    def _hessian(self, x: Tensor) -> np.ndarray:
        if x.ndim == 4:  # a 1x1 convolution sees its channels at every place
            x = x.permute(0, 2, 3, 1)
        rows = x.reshape(-1, x.shape[-1]).numpy()
        if self._batch is None:
            return hessian_of(rows)
        count = len(x)
        weights = self._batch.real[:count].float()
        if self._task.token_weights:
            felt = sum(self._task.token_weights[name][:count] for name in self._members)
            assert isinstance(felt, Tensor)
            weights = weights * felt
        return hessian_of(rows, weights.reshape(-1).numpy())


def _solved(
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
