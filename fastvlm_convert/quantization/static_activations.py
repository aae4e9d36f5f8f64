"""Static quantization of the encoder's activations: ranges, equalization, bias correction, what stays float.

Pictures go through the reference one at a time: once to see how channels differ, once more, equalized, for
ranges and means, and once with all integers, to see what they cost. Only where that is too much does each
layer run alone with integers, and those that cost most for their work are put back to float.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastvlm_convert.activation_report import ActivationReport, FloatLayer
from fastvlm_convert.model.encoder import Encoder, multiplications
from fastvlm_convert.preprocess import pixel_values
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.quantization.activation_ranges import RangeObserver
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantization.weight_plan import WeightPlan
from fastvlm_convert.quantized.activations import (
    ActivationBits,
    LayerScales,
    bits_of,
    gives_floats,
    is_depthwise,
    is_in_encoder,
    unquantizable,
)
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, QuantizedWeight, float_weight
from fastvlm_convert.weights.equalize import equalized, pairs
from fastvlm_convert.weights.source import Weight, WeightSource, computed

MAX_PICTURES: Final = 16  # that ranges are taken from
_JUDGED: Final = 4  # further pictures, on which the result is judged
_ALONE: Final = 2  # of those, on which layers are tried one by one
_ALONE_SIZE: Final = (
    512  # pixels of them: which layers cost most shows as well there, in a quarter of the time
)
_ENOUGH: Final = 0.9995  # cosine of image tokens above which every layer may have integers
_MAX_FLOAT_SHARE: Final = 0.1  # of multiplications
_MAX_EXPONENT: Final = 10  # of a channel's power of two: float16 holds the weights that it changes

_DEPTHWISE: Final = "depthwise: few multiplications, and ONNX Runtime is faster with floats here"
_GELU_BEHIND: Final = (".fc1", ".downsample.0", ".downsample.1", *(f"vision.stem.{i}" for i in range(3)))


@dataclass(frozen=True)
class StaticActivations:
    """What makes a model's activations integers.

    Attributes:
        exponents: See `weights.equalize`.
        scales: Of the layers that multiply integers.
        biases: Of those that have one, corrected, float32.
        report: What was found.
    """

    exponents: Mapping[str, np.ndarray]
    scales: Mapping[str, LayerScales]
    biases: Mapping[str, np.ndarray]
    report: ActivationReport

    def applied(self, weights: MixedSource) -> dict[str, AnyWeight]:
        """Quantized weights, equalized before, with scales of activations and corrected biases."""
        return _with_scales(weights, self.scales, self.biases)


@dataclass(frozen=True)
class _Task:
    """What is quantized.

    Attributes:
        plan: The plan.
        bits: Of activations.
        candidates: Layers that may multiply integers, by name.
        pixels: Pictures that ranges are taken from, float32 [1, 3, S, S] each, made when they are asked for.
        judged: Pictures that the result is judged on.
        alone: The same for layers one by one.
    """

    plan: WeightPlan
    bits: ActivationBits
    candidates: Mapping[str, LayerPlan]
    pixels: "_Pictures"
    judged: "_Pictures"
    alone: "_Pictures"


@dataclass(frozen=True)
class _Pictures:
    """Pictures as the encoder sees them; none is held in memory as pixels."""

    calibration: Calibration
    numbers: range
    plan: WeightPlan
    size: int

    def __iter__(self) -> Iterator[Tensor]:
        images = [image for question in self.calibration.questions for image in question.images]
        settings = replace(self.plan.images, size=self.size)
        return (torch.from_numpy(pixel_values(images[n], settings)) for n in self.numbers)


def static_activations(
    plan: WeightPlan, floats: WeightSource, calibration: Calibration, on_progress: OnShare
) -> StaticActivations:
    """Find scales, corrections and the layers that stay in float.

    Args:
        plan: What happens to the weights; its recipe has integer activations.
        floats: The weights, folded and repaired.
        calibration: Questions with at least one picture.
        on_progress: Called with the share that is done, 0..1.
    """
    task = _task(plan, calibration)
    encoder = Encoder(plan.config, _encoder_part(floats))
    exponents = _exponents(task, encoder, partial(_part, on_progress, 0.0))
    del encoder
    balanced = _encoder_part(equalized(floats, exponents))
    encoder = Encoder(plan.config, balanced)
    ranges, means = _observe(task, encoder, partial(_part, on_progress, 0.3))
    scales = {name: _layer_scales(task, name, ranges) for name in task.candidates}
    exact = [[encoder.run(x) for x in pictures] for pictures in (task.judged, task.alone)]
    macs = multiplications(encoder, next(iter(task.judged)))
    del encoder
    integers = quantize_weights(balanced, [p for p in plan.layers if is_in_encoder(p.layer)])
    biases = {
        f"{name}.bias": _corrected_bias(balanced, integers, name, means[name])
        for name in task.candidates
        if f"{name}.bias" in balanced
    }
    encoder = Encoder(plan.config, _with_scales(integers, scales, biases))
    chosen = _Choice(task, encoder, macs, exact[0], exact[1])
    kept = chosen.choose(partial(_part, on_progress, 0.6))
    report = chosen.report(kept, len(exponents))
    on_progress(1.0)
    scales = {name: scale for name, scale in scales.items() if name not in kept}
    return StaticActivations(exponents, scales, biases, report)


def _part(on_progress: OnShare, begin: float, share: float) -> None:
    on_progress(begin + 0.3 * share)


def _task(plan: WeightPlan, calibration: Calibration) -> _Task:
    candidates = {p.layer: p for p in plan.layers if is_in_encoder(p.layer) and unquantizable(p) is None}
    count = sum(len(question.images) for question in calibration.questions)
    ranged = min(MAX_PICTURES, max(1, count - _JUDGED))
    judged = range(ranged, min(count, ranged + _JUDGED)) if count > ranged else range(ranged)
    size = plan.images.size
    bits = bits_of(plan.recipe)
    assert bits is not None, "activations are floats"
    return _Task(
        plan,
        bits,
        candidates,
        _Pictures(calibration, range(ranged), plan, size),
        _Pictures(calibration, judged, plan, size),
        _Pictures(calibration, judged[:_ALONE], plan, min(size, _ALONE_SIZE)),
    )


def _encoder_part(weights: WeightSource) -> dict[str, Weight]:
    return {name: weight for name, weight in weights.items() if is_in_encoder(name)}


def _with_scales(
    weights: MixedSource, scales: Mapping[str, LayerScales], biases: Mapping[str, np.ndarray]
) -> dict[str, AnyWeight]:
    changed = dict(weights)
    for name, scale in scales.items():
        weight = changed[f"{name}.weight"]
        assert isinstance(weight, QuantizedWeight)
        changed[f"{name}.weight"] = replace(weight, activations=scale)
    for name, bias in biases.items():
        changed[name] = computed(bias.shape, "float32", partial(np.asarray, bias))
    return changed


def _exponents(task: _Task, encoder: Encoder, on_progress: OnShare) -> dict[str, np.ndarray]:
    """Powers of two by which channels are divided: half of what they differ by goes to the weights.

    As in SmoothQuant (arXiv:2211.10438) with half its strength: `sqrt(max |x| / max |w|)` of a channel, so a
    factor that lies between two layers, whatever it is, goes away whole.
    """
    seconds = [pair.second for pair in pairs(encoder_names(encoder)) if pair.second in task.candidates]
    largest: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, _y: Tensor) -> None:
        if name in seconds:
            most = _by_channel(x).abs().amax(1)
            largest[name] = most if name not in largest else torch.maximum(largest[name], most)

    with encoder.watched(see):
        for n in _counted(task.pixels, on_progress):
            encoder.run(n)
    exponents = {}
    for name in seconds:
        weight = encoder.layers[name].weight
        assert isinstance(weight, Tensor)
        rows = weight.abs().flatten(1).amax(0)
        usable = (largest[name] > 0) & (rows > 0)
        ratio = torch.where(usable, largest[name] / rows.clamp_min(1e-30), torch.ones(()))
        half = torch.log2(ratio) / 2
        # Rounded, so that powers of two that lie between the layers go away exactly.
        middle = half[usable].median().round() if usable.any() else torch.zeros(())
        powers = torch.where(usable, half - middle, torch.zeros(())).round()
        exponents[name] = powers.clamp(-_MAX_EXPONENT, _MAX_EXPONENT).to(torch.int8).numpy()
    return exponents


def encoder_names(encoder: Encoder) -> dict[str, None]:
    """Names of the weights of an encoder's layers."""
    return {f"{name}.weight": None for name in encoder.layers}


def _counted(pictures: _Pictures, on_progress: OnShare) -> Iterator[Tensor]:
    for done, pixels in enumerate(pictures, 1):
        yield pixels
        on_progress(done / len(pictures.numbers))


def _by_channel(x: Tensor) -> Tensor:
    """[1, C, H, W] or [1, N, C] -> [C, places]."""
    return x[0].flatten(1) if x.dim() == 4 else x[0].T


_Ranges = Mapping[str, tuple[RangeObserver, RangeObserver]]


def _observe(task: _Task, encoder: Encoder, on_progress: OnShare) -> tuple[_Ranges, Mapping[str, np.ndarray]]:
    """Ranges of what each candidate reads and gives, and the means of the channels that it reads."""
    ranges = {name: (RangeObserver(), RangeObserver()) for name in task.candidates}
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        if name in ranges:
            ranges[name][0].add(x)
            if not gives_floats(task.candidates[name]):
                ranges[name][1].add(y)
            mean = _by_channel(x).double().mean(1)
            sums[name] = sums.get(name, torch.zeros(())) + mean

    with encoder.watched(see):
        for n in _counted(task.pixels, on_progress):
            encoder.run(n)
    count = len(task.pixels.numbers)
    return ranges, {name: (total / count).numpy() for name, total in sums.items()}


def _layer_scales(task: _Task, name: str, ranges: _Ranges) -> LayerScales:
    read, given = ranges[name]
    if gives_floats(task.candidates[name]):
        return LayerScales(read.scale(task.bits), None)
    then = functional.gelu if name.endswith(_GELU_BEHIND) else None
    return LayerScales(read.scale(task.bits), given.scale(task.bits, then))


def _corrected_bias(floats: MixedSource, integers: MixedSource, name: str, mean: np.ndarray) -> np.ndarray:
    """A bias that makes up for what rounding the weights does to the mean (arXiv:1906.04721, section 4.2)."""
    weight, rounded = float_weight(floats, f"{name}.weight"), integers[f"{name}.weight"]
    assert isinstance(rounded, QuantizedWeight)
    error = rounded.dense().array().astype(np.float64) - weight.array()
    by_input = error.reshape(*error.shape[:2], -1).sum(-1)
    if by_input.shape[1] == len(mean):
        shift = by_input @ mean
    else:  # depthwise
        shift = by_input[:, 0] * np.repeat(mean, len(by_input) // len(mean))
    bias: np.ndarray = float_weight(floats, f"{name}.bias").array() - shift
    return bias.astype(np.float32)


@dataclass(frozen=True)
class _Choice:
    """Chooses the layers that stay in float.

    Attributes:
        task: What is quantized.
        encoder: With all integers.
        macs: Multiplications of each layer.
        exact: Image tokens of the pictures judged, without integers.
        alone: The same of those on which layers are tried one by one.
    """

    task: _Task
    encoder: Encoder
    macs: Mapping[str, int]
    exact: Sequence[Tensor]
    alone: Sequence[Tensor]

    def choose(self, on_progress: OnShare) -> dict[str, str]:
        """Layers to keep in float, and why."""
        kept = {name: _DEPTHWISE for name, plan in self.task.candidates.items() if is_depthwise(plan)}
        if self._float_share(kept) > _MAX_FLOAT_SHARE:
            self._take_depthwise(kept)
        if self._cosine(kept) >= _ENOUGH:
            return kept
        rest = [name for name in self.task.candidates if name not in kept]
        noise = self._noise_alone(rest, on_progress)
        signal = sum(float(tokens.double().square().sum()) for tokens in self.alone)
        more: dict[str, str] = {}
        for name in sorted(rest, key=lambda name: -noise[name] / self.macs[name]):
            if self._float_share({*kept, *more, name}) <= _MAX_FLOAT_SHARE:
                sqnr = 10 * np.log10(signal / max(noise[name], 1e-30))
                more[name] = f"its integers alone leave the image tokens at {sqnr:.0f} dB"
        return kept | self._fewest_that_suffice(kept, more)

    def _fewest_that_suffice(self, kept: dict[str, str], more: dict[str, str]) -> dict[str, str]:
        """The first of more layers that suffice beside those kept, found by halving; all if they do not."""
        costly = list(more.items())
        few, enough = 0, len(costly)  # too few, and as many as do or there are
        if self._cosine(kept | more) >= _ENOUGH:
            while enough - few > 1:
                middle = (few + enough) // 2
                if self._cosine(kept | dict(costly[:middle])) >= _ENOUGH:
                    enough = middle
                else:
                    few = middle
        return dict(costly[:enough])

    def _take_depthwise(self, kept: dict[str, str]) -> None:
        """Take depthwise layers out of those kept in float until these do few enough multiplications."""
        noise = self._noise_alone(list(kept), ignore_share)
        for name in sorted(noise, key=lambda name: noise[name] / self.macs[name]):
            if self._float_share(kept) <= _MAX_FLOAT_SHARE:
                break
            del kept[name]

    def report(self, kept: Mapping[str, str], num_equalized: int) -> ActivationReport:
        """What was chosen, and what it costs."""
        total = sum(self.macs.values())
        plans = {plan.layer: plan for plan in self.task.plan.layers}
        layers = []
        for name, count in self.macs.items():
            if name not in plans:
                reason: str | None = "attention's own products"
            else:
                reason = kept.get(name) or unquantizable(plans[name])
            if reason is not None:
                layers.append(FloatLayer(name, reason, round(count / total, 6)))
        return ActivationReport(
            bits=self.task.bits,
            num_layers=len(self.task.candidates) - len(kept),
            num_equalized=num_equalized,
            cosine=round(self._cosine(kept), 4),
            float_share=round(self._float_share(kept), 4),
            float_layers=tuple(layers),
        )

    def _float_share(self, kept: Collection[str]) -> float:
        integers = sum(self.macs[name] for name in self.task.candidates if name not in kept)
        return 1 - integers / sum(self.macs.values())

    def _cosine(self, kept: Collection[str]) -> float:
        self._only(set(self.task.candidates) - set(kept))
        found = [
            functional.cosine_similarity(self.encoder.run(x).double(), tokens.double(), -1).mean()
            for x, tokens in zip(self.task.judged, self.exact, strict=True)
        ]
        return float(torch.stack(found).mean())

    def _noise_alone(self, names: Sequence[str], on_progress: OnShare) -> dict[str, float]:
        """Squared error of image tokens that the activations of each layer alone cause."""
        self._only(set())
        states = [list(self.encoder.states(x)) for x in self.task.alone]
        noise = {}
        for done, name in enumerate(names, 1):
            self._only({name})
            noise[name] = sum(
                float((self.encoder.run_from(name, known) - known[-1][0]).double().square().sum())
                for known in states
            )
            on_progress(done / len(names))
        return noise

    def _only(self, names: set[str]) -> None:
        for name, layer in self.encoder.static.items():
            layer.is_static = name in names
