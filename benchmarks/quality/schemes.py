"""Ways to quantize a model: recipes as shipped, our solvers on all layers, and others' on the same layers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Final

import numpy as np

from benchmarks.quantize_answers import by_peer, fixed, hessians, ours, peers
from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.quantization.calibration import read_calibration
from fastvlm_convert.quantization.prepared_weights import prepare_weights
from fastvlm_convert.quantization.score import AnswerScore
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import Recipe, load_recipe
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import Weight, WeightSource

CALIBRATION: Final = load_recipe("int4").calibration
# Recipes whose integers are another shipped recipe's are not listed: ios-int4 and web-q4f16 are android-int4.
RECIPES: Final = (
    "int8", "int4", "int4-fast", "int4-mixed", "int4-small", "android-int4", "web-small", "ios-ane",
)  # fmt: skip
_FREE: Final = {"scheme": "int4", "symmetric": False}
OURS: Final = {
    "ours, blocks of 32": {**_FREE, "solver": "gptq", "block_size": 32},
    "ours, symmetric, blocks of 32": {"scheme": "int4", "solver": "gptq", "block_size": 32},
    "ours, blocks of 128": {**_FREE, "solver": "gptq", "block_size": 128},
    "search, blocks of 32": {**_FREE, "block_size": 32},
    "palettes": {"scheme": "palette4", "channel_scale": True, "solver": "gptq"},
}
PEERS: Final = (
    "coremltools RTN, symmetric", "coremltools RTN, asymmetric",
    "ONNX Runtime RTN, symmetric", "ONNX Runtime RTN, asymmetric",
    "textbook GPTQ",
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A way's weights, folded, and the score that `quantize` would print; None where it prints none."""

    weights: WeightSource
    score: AnswerScore | None


def schemes(checkpoint: Checkpoint) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Every way by its name; nothing is computed until it is called."""
    weights = fold(checkpoint.weights)
    yield "fp16", lambda: Made({name: _half(weight) for name, weight in weights.items()}, None)
    for name in RECIPES:
        yield name, partial(_by_us, checkpoint, load_recipe(name))
    for label, rule in OURS.items():
        yield label, partial(_by_us, checkpoint, _with(ours(weights, "all", **rule)))
    found = cache(partial(hessians, checkpoint, CALIBRATION))
    for label in PEERS:
        yield label, partial(_by_peer, weights, label, found)


def _by_peer(weights: WeightSource, label: str, found: Callable[[], Mapping[str, np.ndarray]]) -> Made:
    """All layers as a peer rounds or solves them; `found` gives Hessians, which take time."""
    data = found() if label == "textbook GPTQ" else _Nothing()
    return Made(by_peer(weights, peers(32)[label], data, "all"), None)


class _Nothing(dict[str, np.ndarray]):
    """Hessians of solvers that do not look at them."""

    def __missing__(self, key: str) -> np.ndarray:
        return np.zeros((0, 0))


def _with(recipe: Recipe) -> Recipe:
    return replace(recipe, calibration=CALIBRATION)


def _by_us(checkpoint: Checkpoint, recipe: Recipe) -> Made:
    plan = plan_weights(checkpoint, recipe)
    data = read_calibration(None, recipe.calibration, checkpoint.tokenizer) if plan.is_calibrated else None
    made = prepare_weights(plan, data)
    return Made(dense_view(made.weights), made.score)


def _half(weight: Weight) -> Weight:
    return fixed(weight.array().astype(np.float16).astype(np.float32))
