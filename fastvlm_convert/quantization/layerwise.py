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

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.quantization.answers import Answered, TokenBatch, token_batch
from fastvlm_convert.quantization.asymmetric_calibration import Moments, aimed, moments_of, shifted_bias
from fastvlm_convert.quantization.awq import channel_scales, norm_before
from fastvlm_convert.quantization.gptq import gptq
from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantized.codec import load_layer, save_layer
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineScheme, QuantizedMatrix
from fastvlm_convert.quantized.weight import AnyWeight, StoredWeight, dense_view
from fastvlm_convert.recipe import CalibrationSettings
from fastvlm_convert.weights.parts import by_shared_input, is_language
from fastvlm_convert.weights.source import Weight

MAX_ACTIVATION_BYTES = 512 << 20  # of the widest activation of a block, over the samples that solve it
MAX_PIXELS = 32 << 20  # of the images that solve the encoder's layers: 32 of 1024 x 1024
PIXELS_TOGETHER = 2 << 20  # that go through the whole encoder at a time


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

    reference: BlockStreamer
    chain: BlockStreamer
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
def solve(task: Task, on_progress: OnShare = ignore_share) -> Solved:
    """Solve every layer of a task.

    Args:
        task: The layers and the data.
        on_progress: Called with the share that is done, 0..1.
    """
    chain, found = task.chain, dict[str, AnyWeight]()
    vision, decoder = chain.vision_blocks(), chain.decoder_blocks()
    total = len(vision) + len(decoder)
    states = _features(task, found, lambda done: on_progress(done / total))
    samples = task.answered.samples
    batch = token_batch(samples, states.quantized, chain.embed)
    expected = token_batch(samples, states.reference, task.reference.embed)
    scale = chain.config.decoder.residual_scale
    states = _States(batch.embeds * scale, expected.embeds * scale)
    for done, block in enumerate(decoder):
        states = _through(task, block, states, batch, found)
        on_progress((len(vision) + done + 1) / total)
    return Solved(found, states.quantized[batch.answers])


def _features(task: Task, found: dict[str, AnyWeight], on_block: Callable[[int], None]) -> _States:
    """Image tokens of both models; the encoder runs only where it is not the float model's.

    Some images solve its layers, and all go through it in the end.
    """
    reference = torch.from_numpy(task.answered.features)
    weights = task.chain.weights
    is_solved = not all(map(is_language, task.plans))
    names = [name for name in weights if not is_language(name)]
    if not is_solved and all(weights[name] is task.reference.weights[name] for name in names):
        return _States(reference, reference)
    pixels = torch.from_numpy(task.answered.pixel_values)
    if not is_solved:
        return _States(_encoded(task.chain, pixels), reference)
    few = max(1, MAX_PIXELS // pixels[0, 0].numel())
    states = _States(pixels[:few], pixels[:few])
    for done, block in enumerate(task.chain.vision_blocks()):
        states = _through(task, block, states, None, found)
        on_block(done + 1)
    solved = BlockStreamer(task.chain.config, {**weights, **dense_view(found)})
    return _States(torch.cat([states.quantized, _encoded(solved, pixels[few:])]), reference)


def _encoded(chain: BlockStreamer, pixels: Tensor) -> Tensor:
    """Image tokens, float32 [images, num_image_tokens, hidden]; some images at a time through all blocks."""
    modules = [chain.load(block) for block in chain.vision_blocks()]
    shape = (chain.config.vision.num_image_tokens, chain.config.decoder.hidden_size)
    features = [torch.zeros(0, *shape)]
    for part in torch.split(pixels, max(1, PIXELS_TOGETHER // (pixels.shape[-1] ** 2))):
        for module in modules:
            part = chain.run(module, part)
        features.append(part)
    return torch.cat(features)


def _through(
    task: Task, block: str, states: _States, batch: TokenBatch | None, found: dict[str, AnyWeight]
) -> _States:
    """Solve a block's layers while as many samples as fit go through it; then the others follow."""
    module, reference = task.chain.load(block), task.reference.load(block)
    layers = {f"{block}.{n}": layer for n, layer in module.named_modules() if f"{block}.{n}" in task.plans}
    shared = {members[0]: list(members) for members in by_shared_input(layers)}
    fitting = _fitting(task.chain, module, states.quantized)
    inputs: dict[str, Tensor] = {}
    hooks = [
        reference.get_submodule(first.removeprefix(f"{block}.")).register_forward_pre_hook(
            lambda _m, given, first=first: inputs.__setitem__(first, given[0])
        )
        for first in shared
    ]
    expected = _run(task.chain, reference, states.reference, fitting, hooks)
    hooks = []
    for first, members in shared.items():
        before = norm_before(members) if task.settings.awq else None
        norm = None if before is None else (before, module.get_submodule(before.removeprefix(f"{block}.")))
        solver = _Solver(task, {n: layers[n] for n in members}, norm, inputs, first, batch, found)
        hooks += [layers[name].register_forward_pre_hook(solver) for name in members]
    return _States(_run(task.chain, module, states.quantized, fitting, hooks), expected)


def _run(
    chain: BlockStreamer, module: nn.Module, x: Tensor, fitting: int, hooks: Sequence[RemovableHandle]
) -> Tensor:
    """The first samples pass with hooks in place, the others without, as many at a time."""
    first = chain.run(module, x[:fitting])
    for hook in hooks:
        hook.remove()
    if fitting >= len(x):
        return first
    result = first.new_empty(len(x), *first.shape[1:])  # no list of parts: they would be held twice
    result[:fitting] = first
    for start in range(fitting, len(x), fitting):
        result[start : start + fitting] = chain.run(module, x[start : start + fitting])
    return result


def _fitting(chain: BlockStreamer, module: nn.Module, x: Tensor) -> int:
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
    """Solves the layers that share an input when that input comes to the first of them.

    With `norm` it moves channel scales from the norm to the layers. The norm's output was made before, so
    what comes to the layers in this pass is divided on its way.
    """

    def __init__(
        self,
        task: Task,
        layers: Mapping[str, nn.Module],
        norm: tuple[str, nn.Module] | None,
        reference: Mapping[str, Tensor],
        first: str,
        batch: TokenBatch | None,
        found: dict[str, AnyWeight],
    ) -> None:
        self._task = task
        self._layers = layers
        self._norm = norm
        self._divisor: Tensor | None = None
        self._reference = reference
        self._first = first
        self._batch = batch
        self._found = found

    def __call__(self, module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = given
        if module is self._layers[self._first]:
            self._all(x)
        return (x if self._divisor is None else x / self._divisor,)

    def _all(self, x: Tensor) -> None:
        missing = [name for name in self._layers if self._kept(name) is None]
        if missing:
            moments = self._moments(x)
            scales, norm = self._scaling(moments)  # of all layers, so that a later run finds the same
            for name in missing:
                self._solve(name, moments.scaled(scales), scales, norm if name == self._first else {})
        for name in self._layers:
            self._take(name)

    def _scaling(self, moments: Moments) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Channel scales, and the norm with them taken out."""
        schemes = {self._task.plans[layer].scheme for layer in self._layers}
        (scheme,) = schemes if len(schemes) == 1 else (None,)
        if self._norm is None or not isinstance(scheme, AffineScheme):
            return np.ones(len(moments.hessian), np.float32), {}
        weights = [layer.get_parameter("weight").numpy() for layer in self._layers.values()]
        scales = channel_scales(weights, moments.hessian, scheme)
        name, norm = self._norm
        return scales, {f"{name}.{part}": value.numpy() / scales for part, value in norm.named_parameters()}

    def _kept(self, name: str) -> tuple[StoredWeight, dict[str, Weight]] | None:
        return kept_layer(self._task.folder, self._task.plans[name])

    def _solve(self, name: str, moments: Moments, scales: np.ndarray, norm: Mapping[str, np.ndarray]) -> None:
        weight, bias = (getattr(self._layers[name], part) for part in ("weight", "bias"))
        original = weight.reshape(len(weight), -1).numpy() * scales
        plan = self._task.plans[name]
        matrix = _rounded(aimed(original, moments), moments.hessian, plan, self._task.settings)
        floats = dict(norm)
        if bias is not None:
            rounded = matrix.dequantized()
            floats[f"{name}.bias"] = shifted_bias(bias.numpy(), original, rounded, moments)
        save_layer(_path(self._task.folder, name), matrix, floats)

    def _take(self, name: str) -> None:
        """Give a layer what its file holds."""
        layer = self._layers[name]
        kept = self._kept(name)
        assert kept is not None, "it was written just now"
        weight, floats = kept
        self._found |= {f"{name}.weight": weight, **floats}
        layer.weight = _fixed(weight.dense().array())
        if f"{name}.bias" in floats:
            layer.bias = _fixed(floats.pop(f"{name}.bias").array())
        if floats:
            self._take_norm(floats)

    def _take_norm(self, floats: Mapping[str, Weight]) -> None:
        assert self._norm is not None
        name, norm = self._norm
        before = norm.get_parameter("weight").clone()
        for part, weight in floats.items():
            norm.register_parameter(part.removeprefix(f"{name}."), _fixed(weight.array()))
        after = norm.get_parameter("weight")
        self._divisor = torch.where(after == 0, 1.0, before / after)

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


def kept_layer(folder: Path, plan: LayerPlan) -> tuple[StoredWeight, dict[str, Weight]] | None:
    """A finished layer: its weight and the floats that solving it changed; None where there is none."""
    assert plan.scheme is not None
    try:
        return load_layer(_path(folder, plan.layer), plan.shape, plan.scheme)
    except CheckpointError:  # a cache that cannot be read is no cache
        return None


def _path(folder: Path, layer: str) -> Path:
    return folder / f"{layer}.safetensors"


def _fixed(values: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(values), requires_grad=False)


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
