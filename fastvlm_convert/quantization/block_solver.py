"""Solve the layers of one block while the samples pass through it.

The samples pass through the float block first, which records what its layers read or, where that is less,
give; then through the quantized one. When they reach a group of layers that share an input, the pass waits
while the group is

    solved on what it reads -> saved -> loaded -> installed

and goes on through what was stored. So one pass serves all layers of a block, each of which is solved on what
the stored layers before it give. Groups that are saved already, by an earlier run, are only installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.model.block_streamer import BlockStreamer, OnInput, OnOutput, intercepted, shown
from fastvlm_convert.quantization.answers import CalibrationSet
from fastvlm_convert.quantization.asymmetric_calibration import moments_of
from fastvlm_convert.quantization.awq import norm_before
from fastvlm_convert.quantization.layer_solver import FloatGroup, FloatLayer, solve_layers
from fastvlm_convert.quantization.limits import MAX_ACTIVATION_BYTES
from fastvlm_convert.quantization.stages import SOLVED
from fastvlm_convert.quantized.codec import load_layer, save_layer
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.weight import AnyWeight
from fastvlm_convert.recipe_settings import CalibrationSettings
from fastvlm_convert.user_cache import current_tally
from fastvlm_convert.weights.parts import by_shared_input, stream_reader_of
from fastvlm_convert.weights.source import Weight


@dataclass(frozen=True)
class SolverTask:
    """What is to be solved, and with what.

    Attributes:
        reference: The float model.
        quantized: The same, where layers that need no data hold their dequantized integers already.
        plans: Layer -> its plan, of those to be solved.
        settings: How data is used.
        data: The samples.
        token_weights: Layer -> weight of every token, float32 [samples, tokens]; empty for equal weights.
        folder: Where solved layers are saved.
        has_fine_encoder: Whether the encoder's integers need no data and have 8 bits: they change its image
            tokens so little that the decoder is solved on the float encoder's, which are there already.
    """

    reference: BlockStreamer
    quantized: BlockStreamer
    plans: Mapping[str, LayerPlan]
    settings: CalibrationSettings
    data: CalibrationSet
    token_weights: Mapping[str, Tensor]
    folder: Path
    has_fine_encoder: bool = False


@dataclass(frozen=True)
class Activations:
    """What every sample is at some place of both models, [samples, ...] each.

    Attributes:
        reference: In the float model.
        quantized: In the quantized one, behind stored layers.
    """

    reference: Tensor
    quantized: Tensor


Group = tuple[str, ...]
"""Names of layers that share an input, in the order in which they run."""


@dataclass(frozen=True)
class _Block:
    """One block of both models.

    Attributes:
        name: Prefix of its layers' names.
        reference: In the float model.
        quantized: In the quantized one; its layers take their stored weights as they are solved.
        groups: The layers to solve.
        real: Which tokens are no padding, bool [samples, tokens]; None in the encoder, which has no padding.
    """

    name: str
    reference: nn.Module
    quantized: nn.Module
    groups: list[Group]
    real: Tensor | None

    def local(self, name: str) -> str:
        """The name within the block of a layer or tensor."""
        return name.removeprefix(f"{self.name}.")


def solve_block(
    task: SolverTask, name: str, states: Activations, real: Tensor | None
) -> tuple[Activations, dict[str, AnyWeight]]:
    """Solve the layers of a block with as many samples as fit; then the others pass.

    Args:
        task: The layers and the data.
        name: The block.
        states: The samples before it; they may be overwritten by those behind it.
        real: Which tokens are no padding, bool [samples, tokens]; None where there is no padding.

    Returns:
        The samples behind it; and the stored weights by canonical name.
    """
    quantized = task.quantized.load(name)
    layers = (f"{name}.{layer}" for layer, _ in quantized.named_modules())
    groups = by_shared_input(layer for layer in layers if layer in task.plans)
    block = _Block(name, task.reference.load(name), quantized, groups, real)
    count = _num_fitting(task.quantized, quantized, states.quantized)
    if real is not None:
        count = min(count, task.data.num_fitted)
    recorded, expected = _record(task, block, states.reference[:count])
    stored, found = _solve_groups(task, block, states.quantized[:count], recorded)
    behind = Activations(
        _others_follow(task.reference, block.reference, states.reference, expected),
        _others_follow(task.quantized, block.quantized, states.quantized, found),
    )
    return behind, stored


@dataclass(frozen=True)
class _Recording:
    """What the float block computes where layers are solved; all are taken when their turn comes.

    Attributes:
        inputs: What groups read, by their names.
        outputs: What layers give that have fewer outputs than inputs, in the place of what they read.
        streams: The residual streams that outputs of layers are added to, by the names of their readers.
    """

    inputs: dict[Group, Tensor] = field(default_factory=dict)
    outputs: dict[Group, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)


def _record(task: SolverTask, block: _Block, x: Tensor) -> tuple[_Recording, Tensor]:
    """What the float block computes, and what comes out of it."""
    found = _Recording()

    def note_input(group: Group, given: Tensor) -> Tensor:
        found.inputs[group] = given
        return given

    given: dict[nn.Module, OnOutput] = {}
    read: dict[nn.Module, OnInput] = {}
    for group in block.groups:
        layer = block.reference.get_submodule(block.local(group[0]))
        if _is_narrowing(layer, group):
            given[layer] = partial(found.outputs.__setitem__, group)
        else:
            read[layer] = partial(note_input, group)
    read |= _stream_handlers(block, block.reference, found.streams)
    with intercepted(read), shown(given):
        output = task.reference.run(block.reference, x)
    return found, output


def _is_narrowing(layer: nn.Module, group: Group) -> bool:
    """Whether a layer that shares its input with no other has fewer outputs than inputs."""
    rows, columns = layer.get_parameter("weight").shape[:2]
    return len(group) == 1 and rows < columns


def _stream_handlers(block: _Block, module: nn.Module, found: dict[str, Tensor]) -> dict[nn.Module, OnInput]:
    """Note the residual streams that outputs of layers are added to, each under the name of what reads it."""

    def note(reader: str, given: Tensor) -> Tensor:
        found[reader] = given
        return given

    readers = {reader for group in block.groups if (reader := stream_reader_of(group[0]))}
    return {module.get_submodule(block.local(reader)): partial(note, reader) for reader in readers}


def _solve_groups(
    task: SolverTask, block: _Block, x: Tensor, recorded: _Recording
) -> tuple[dict[str, AnyWeight], Tensor]:
    """The stored weights of all groups, each solved when it is reached; and what comes out of the block."""
    stored: dict[str, AnyWeight] = {}
    divisors: dict[Group, Tensor | None] = {}
    streams: dict[str, Tensor] = {}

    def reach(group: Group, given: Tensor) -> Tensor:
        if group not in divisors:  # this is the first of its layers
            reader = stream_reader_of(group[0])
            drift = None if reader is None else recorded.streams.pop(reader) - streams.pop(reader)
            _solve_and_save(task, block, group, given, recorded, drift)
            found = _load_group(task, group)
            divisors[group] = _install(block, group, found)
            stored.update(found)
        divisor = divisors[group]
        return given if divisor is None else given / divisor

    handlers = {
        block.quantized.get_submodule(block.local(layer)): partial(reach, group)
        for group in block.groups
        for layer in group
    }
    with intercepted(handlers | _stream_handlers(block, block.quantized, streams)):
        output = task.quantized.run(block.quantized, x)
    return stored, output


def _solve_and_save(
    task: SolverTask,
    block: _Block,
    group: Group,
    given: Tensor,
    recorded: _Recording,
    drift: Tensor | None,
) -> None:
    """Solve the layers of a group that no earlier run has saved, on what the first samples are there.

    Args:
        task: The layers and the data.
        block: Where they are.
        group: Their names.
        given: What they read in the quantized model.
        recorded: What the float model has there.
        drift: Float model's minus quantized model's residual stream that the group's output is added to,
            shaped like the output; None where it is added to none.
    """
    reference, output = recorded.inputs.pop(group, None), recorded.outputs.pop(group, None)
    missing = [layer for layer in group if load_solved(task.folder, task.plans[layer]) is None]
    for layer in group:
        current_tally().note(SOLVED, layer, layer not in missing)
    if not missing:
        return
    lacking = drift
    if output is not None:  # before it is solved, the layer has the float model's weight
        lacking = output - block.quantized.get_submodule(block.local(group[0])).forward(given)
        lacking = lacking if drift is None else lacking + drift
    moments = moments_of(
        _rows(given).numpy(),
        _row_weights(task, block, group, len(given)),
        reference=None if reference is None else _rows(reference).numpy(),
        missing=None if lacking is None else _rows(lacking).numpy(),
    )
    for solved in solve_layers(_float_group(task, block, group), moments, task.settings, missing):
        save_layer(_path(task.folder, solved.name), solved.matrix, solved.floats)


def _load_group(task: SolverTask, group: Group) -> dict[str, AnyWeight]:
    """The stored weights of a group, read from their files when they are needed: memory holds one block."""
    stored: dict[str, AnyWeight] = {}
    for layer in group:
        found = load_solved(task.folder, task.plans[layer])
        assert found is not None, f"'{layer}' was saved just now"
        stored |= found
    return stored


def _row_weights(task: SolverTask, block: _Block, group: Group, count: int) -> np.ndarray | None:
    """Importance of the tokens of the first samples, float32 [count * tokens]; None for equal weights."""
    if block.real is None:
        return None
    weights = block.real[:count].float()
    if task.token_weights:
        weights = weights * torch.stack([task.token_weights[layer][:count] for layer in group]).sum(0)
    return weights.reshape(-1).numpy()


def _float_group(task: SolverTask, block: _Block, group: Group) -> FloatGroup:
    """A group as it is before any of its layers is installed."""
    layers = []
    for name in group:
        parts = {n: value.numpy() for n, value in _parameters(block, name).items()}
        weight = parts["weight"].reshape(len(parts["weight"]), -1)
        layers.append(FloatLayer(task.plans[name], weight, parts.get("bias")))
    norm = norm_before(group) if task.settings.awq else None
    gain = {} if norm is None else _parameters(block, norm)
    return FloatGroup(tuple(layers), {f"{norm}.{part}": value.numpy() for part, value in gain.items()})


def _parameters(block: _Block, name: str) -> dict[str, nn.Parameter]:
    """`weight` and, where it has one, `bias` of a layer or norm of the quantized block."""
    return dict(block.quantized.get_submodule(block.local(name)).named_parameters())


def _install(block: _Block, group: Group, stored: Mapping[str, AnyWeight]) -> Tensor | None:
    """Put stored weights in the place of a block's own.

    Returns:
        What this pass must divide the group's input by, float32 [columns]: the input was made before channel
        scales were folded into its norm. None where that norm stays.
    """
    norm = norm_before(group)
    gain = f"{norm}.weight"
    before = None if norm is None or gain not in stored else _parameters(block, norm)["weight"]
    for name, weight in stored.items():
        module, _, parameter = block.local(name).rpartition(".")
        values = (weight if isinstance(weight, Weight) else weight.dense()).array()
        fixed = nn.Parameter(torch.from_numpy(values), requires_grad=False)
        setattr(block.quantized.get_submodule(module), parameter, fixed)
    if before is None or norm is None:
        return None
    after = _parameters(block, norm)["weight"]
    return torch.where(after == 0, 1.0, before / after)


def load_solved(folder: Path, plan: LayerPlan) -> dict[str, AnyWeight] | None:
    """A layer that was solved: by canonical name its weight, and the floats that changed with it.

    Returns:
        None where the folder has no such file, or a damaged one.
    """
    assert plan.scheme is not None
    try:
        weight, floats = load_layer(_path(folder, plan.layer), plan.shape, plan.scheme)
    except CheckpointError:  # a cache that cannot be read is no cache
        return None
    return {f"{plan.layer}.weight": weight, **floats}


def _path(folder: Path, layer: str) -> Path:
    return folder / f"{layer}.safetensors"


def _rows(x: Tensor) -> Tensor:
    """[tokens, columns] of all samples; a 1x1 convolution reads its channels at every place of an image."""
    channels_last = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
    return channels_last.reshape(-1, channels_last.shape[-1])


def _others_follow(model: BlockStreamer, module: nn.Module, x: Tensor, first: Tensor) -> Tensor:
    """All samples behind a block, given the first ones; the others pass, as many at a time."""
    count = len(first)
    if count == len(x):
        return first
    # In the place of what no other needs, where that has room: all samples would be held twice otherwise.
    result = x if first.shape[1:] == x.shape[1:] else first.new_empty(len(x), *first.shape[1:])
    result[:count] = first
    for start in range(count, len(x), count):
        result[start : start + count] = model.run(module, x[start : start + count])
    return result


def _num_fitting(model: BlockStreamer, module: nn.Module, x: Tensor) -> int:
    """Samples whose widest activation in a block stays within the limit; at least one."""
    widest = 0

    def measure(output: Tensor) -> None:
        nonlocal widest
        widest = max(widest, 4 * output.numel())

    with shown({layer: measure for layer in module.modules() if not list(layer.children())}):
        model.run(module, x[:1])
    return min(len(x), max(1, MAX_ACTIVATION_BYTES // max(widest, 1)))
