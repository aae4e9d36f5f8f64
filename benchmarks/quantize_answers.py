"""What int4 and int8 weights cost the answers: our quantizer and its peers on the same layers.

    python -m benchmarks.quantize_answers CHECKPOINT... [--pictures 150] [--output FILE.json]

The layers that the recipe int4-small stores in 4 bits, except the table, get 4 bits in blocks of 32 unless
a row says otherwise. We calibrate with 128 pictures: at the demo's 256 pixels they have as many positions as
8 pictures of 1024 pixels. Pictures are held-out ones of the demo generator, and degraded (blurred, noisy)
ones, on which the model is less certain. KL divergences are over the tokens of the reference's answers.
"""

import argparse
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.neural_compressor.weight_only import gptq as onnxruntime_gptq
from PIL import Image

from benchmarks.quantize_layers import coreml, onnxruntime
from fastvlm_convert import metrics
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.demo.camera import badly_taken
from fastvlm_convert.demo.samples import HELD_OUT_SEED, make_sample
from fastvlm_convert.generate import generate
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.model.session import TorchSession
from fastvlm_convert.prompt import build_prompt, user_message
from fastvlm_convert.quantization.answers import Sample as Tokens
from fastvlm_convert.quantization.answers import collect_samples, token_batch
from fastvlm_convert.quantization.calibration import read_calibration
from fastvlm_convert.quantization.error_compensation import hessian_of
from fastvlm_convert.quantization.prepared_weights import prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.schemes import AffineScheme
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import Recipe, load_recipe
from fastvlm_convert.recipe_settings import CalibrationSettings, QuantizeRule
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import Weight, WeightSource, computed
from tests.quantization.layers import textbook_gptq

MAX_TOKENS = 64
ROWS = 64  # questions side by side
DEGRADED_SEED = HELD_OUT_SEED + 100_000
PARTS = {"all": ("*",), "vision": ("vision.*",), "decoder": ("decoder.*", "projector.*")}
CALIBRATION = replace(load_recipe("int4").calibration, num_samples=128)
FLOAT = QuantizeRule(("*",), "float")
KEPT = QuantizeRule(("decoder.embed_tokens",), "float")


@dataclass(frozen=True)
class Test:
    """Questions with the reference's answers, and the logits that gave them."""

    pixel_values: torch.Tensor
    pictures: list[int]
    samples: list[Tokens]
    logits: np.ndarray


def pictures(first: int, count: int, bad: bool) -> Iterator[tuple[Image.Image, list[str]]]:
    """Pictures with all their questions, or with three each if they are degraded."""
    for seed in range(first, first + count):
        sample = make_sample(seed)
        texts = [q.question for q in sample.questions]
        yield (badly_taken(sample.image, seed), texts[seed % 3 :: 3]) if bad else (sample.image, texts)


def ask(checkpoint: Checkpoint, found: Iterator[tuple[Image.Image, list[str]]]) -> Test:
    """The reference's answers."""
    session = TorchSession(load_model(checkpoint.config, checkpoint.weights), 512)
    pixels, numbers, samples = [], [], []
    for number, (image, texts) in enumerate(found):
        features = None
        for text in texts:
            message, settings = user_message(text, [image]), checkpoint.pictures.image
            prompt = build_prompt([message], checkpoint.prompt.format, checkpoint.tokenizer, settings)
            if features is None:
                features = [session.encode_image(prompt.images[0])]
                pixels.append(prompt.images[0])
            said = generate(session, prompt, checkpoint.eos_token_ids, MAX_TOKENS, features=features)
            answer = np.asarray([*said.token_ids, checkpoint.eos_token_ids[0]], np.int64)
            numbers.append(number)
            samples.append(Tokens(prompt.segments, answer))
    order = sorted(range(len(samples)), key=lambda n: len(samples[n].segments[1]) + len(samples[n].answer))
    test = Test(
        torch.from_numpy(np.concatenate(pixels)),
        [numbers[n] for n in order],
        [samples[n] for n in order],
        np.zeros(0),
    )
    return replace(test, logits=logits_of(checkpoint, fold(checkpoint.weights), test))


@torch.no_grad()
def logits_of(checkpoint: Checkpoint, weights: WeightSource, test: Test) -> np.ndarray:
    """The logits that predict each token of the answers, float32 [tokens, vocab]."""
    chain = BlockStreamer(checkpoint.config, weights)
    encoder = [chain.load(block) for block in chain.vision_blocks()]
    features = torch.cat([through(chain, encoder, part) for part in torch.split(test.pixel_values, 32)])
    decoder = [chain.load(block) for block in chain.decoder_blocks()]
    table = chain.tensor("decoder.embed_tokens.weight")
    parts = []
    for start in range(0, len(test.samples), ROWS):
        rows = slice(start, start + ROWS)
        batch = token_batch(test.samples[rows], features[test.pictures[rows]], lambda ids: table[ids])
        parts.append(chain.logits(through(chain, decoder, batch.embeds)[batch.answers]))
    return torch.cat(parts).numpy()


def through(chain: BlockStreamer, blocks: Sequence[torch.nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Some blocks in turn."""
    for block in blocks:
        x = chain.run(block, x)
    return x


def matrices(weights: WeightSource) -> list[str]:
    """Layers that every method quantizes to 4 bits: those of `int4-small`, except the table."""
    plans = plan_layers({name: weight.shape for name, weight in weights.items()}, load_recipe("int4-small"))
    return [p.layer for p in plans if p.scheme and p.scheme.bits == 4 and p.layer != "decoder.embed_tokens"]


def fits(layer: str, part: str) -> bool:
    """Whether a layer belongs to a part."""
    return any(layer.startswith(pattern.rstrip("*")) for pattern in PARTS[part])


@torch.no_grad()
def hessians(checkpoint: Checkpoint, settings: CalibrationSettings = CALIBRATION) -> dict[str, np.ndarray]:
    """Hessians of the float model's inputs over the calibration data, one per layer."""
    config, weights = checkpoint.config, fold(checkpoint.weights)
    plan = plan_weights(checkpoint, replace(load_recipe("int4"), calibration=settings))
    data = collect_samples(plan, read_calibration(None, settings, checkpoint.tokenizer))
    chain, found = BlockStreamer(config, weights), dict[str, np.ndarray]()
    layers = set(matrices(weights))
    real: torch.Tensor | None = None

    def watch(name: str) -> Callable[[object, tuple[torch.Tensor]], None]:
        def look(_module: object, given: tuple[torch.Tensor]) -> None:
            x = given[0].permute(0, 2, 3, 1) if given[0].ndim == 4 else given[0]
            rows = x.reshape(-1, x.shape[-1]) if real is None else x[real]
            found[name] = hessian_of(rows.contiguous().numpy())

        return look

    def run(block: str, x: torch.Tensor) -> torch.Tensor:
        module = chain.load(block)
        for name, layer in module.named_modules():
            if f"{block}.{name}" in layers:
                layer.register_forward_pre_hook(watch(f"{block}.{name}"))
        return chain.run(module, x)

    x = torch.cat(list(data.pictures))
    for block in chain.vision_blocks():
        x = run(block, x)
    batch = token_batch(data.samples, x, chain.embed)
    x, real = batch.embeds, batch.real
    for block in chain.decoder_blocks():
        x = run(block, x)
    return found


Solver = Callable[[np.ndarray, np.ndarray], np.ndarray]


def peers(size: int) -> dict[str, Solver]:
    """How others quantize a matrix [rows, columns], given also its Hessian."""
    free = AffineScheme(4, size, symmetric=False)
    default = nbits.DefaultWeightOnlyQuantConfig
    return {
        "coremltools RTN, symmetric": lambda w, _: coreml(w, size, "LINEAR_SYMMETRIC"),
        "coremltools RTN, asymmetric": lambda w, _: coreml(w, size, "LINEAR"),
        "ONNX Runtime RTN, symmetric": lambda w, _: onnxruntime(
            w, default(block_size=size, is_symmetric=True)
        ),
        "ONNX Runtime RTN, asymmetric": lambda w, _: onnxruntime(
            w, default(block_size=size, is_symmetric=False)
        ),
        "ONNX Runtime HQQ": lambda w, _: onnxruntime(w, nbits.HQQWeightOnlyQuantConfig(block_size=size)),
        "ONNX Runtime GPTQ": lambda w, h: onnxruntime_gptq(w.T.copy(), h.copy(), 4, size, "asym").T.astype(
            np.float32
        ),
        "textbook GPTQ": lambda w, h: textbook_gptq(w, h, free),
    }


def by_peer(
    weights: Mapping[str, Weight], solve: Solver, found: Mapping[str, np.ndarray], part: str
) -> dict[str, Weight]:
    """Weights with the layers of a part quantized."""
    changed = dict(weights)
    for layer in matrices(weights):
        if fits(layer, part):
            name = f"{layer}.weight"
            shape = weights[name].shape
            values = solve(weights[name].array().reshape(shape[0], -1), found[layer])
            changed[name] = fixed(values.reshape(shape))
    return changed


def fixed(values: np.ndarray) -> Weight:
    """A weight with these values."""
    return computed(values.shape, "float32", lambda: values)


def ours(weights: WeightSource, part: str, **rule: object) -> Recipe:
    """A recipe for the layers of a part; a layer that is too narrow for the blocks gets blocks of 32."""
    size = rule.get("block_size", 1)
    assert isinstance(size, int)
    narrow, wide = [], []
    for layer in matrices(weights):
        if fits(layer, part):
            (narrow if weights[f"{layer}.weight"].shape[1] % size else wide).append(layer)
    rules = [QuantizeRule(tuple(wide), **rule)]  # type: ignore[arg-type]
    if narrow:
        rules.append(QuantizeRule(tuple(narrow), **{**rule, "block_size": 32}))  # type: ignore[arg-type]
    return replace(load_recipe("int4"), quantize=(KEPT, *rules, FLOAT), calibration=CALIBRATION)


def main() -> None:
    """Print a table for each checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--only", default="", help="only rows whose label matches this regular expression")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # ONNX Runtime logs every node
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("FASTVLM_CONVERT_CACHE", cache)
        for path in arguments.checkpoints:
            results[path.name] = measure(path, arguments.pictures, arguments.only)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1))


def measure(path: Path, count: int, only: str) -> dict[str, dict[str, list[float]]]:
    """Mean KL, its 99th percentile and top-1 agreement by method and set of pictures."""
    checkpoint = open_checkpoint(path)
    weights = fold(checkpoint.weights)
    tests = {
        "held-out": ask(checkpoint, pictures(HELD_OUT_SEED, count, bad=False)),
        "degraded": ask(checkpoint, pictures(DEGRADED_SEED, 3 * count, bad=True)),
    }
    print(f"\n## {path.name}")
    for name, test in tests.items():
        p = np.exp(test.logits - test.logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(-1).mean()
        print(f"{name}: {len(test.samples)} questions, {len(test.logits)} tokens, entropy {entropy:.2g} nats")
    print(
        f"{'':36}" + "".join(f"{name + ' mean':>16}{'p99':>10}{'top-1':>9}" for name in tests) + "   seconds"
    )
    rows: dict[str, dict[str, list[float]]] = {}

    def show(label: str, make: Callable[[], WeightSource]) -> None:
        if not re.search(only, label):
            return
        start = time.process_time()
        changed = make()
        seconds = time.process_time() - start
        rows[label] = {}
        for name, test in tests.items():
            logits = logits_of(checkpoint, changed, test)
            divergence = metrics.kl_divergence(test.logits, logits)
            top1 = metrics.top1_agreement(test.logits, logits)
            rows[label][name] = [float(divergence.mean()), float(np.quantile(divergence, 0.99)), top1]
        cells = "".join(f"{m:16.3g}{p:10.2g}{t:9.5f}" for m, p, t in rows[label].values())
        print(f"{label:36}{cells}{seconds:10.1f}", flush=True)

    found = hessians(checkpoint)
    data = read_calibration(None, CALIBRATION, checkpoint.tokenizer)

    def engine(recipe: Recipe) -> WeightSource:
        plan = plan_weights(checkpoint, recipe)
        return dense_view(prepare_weights(plan, data if plan.is_calibrated else None).weights)

    for name, solve in peers(32).items():
        show(f"{name}", lambda solve=solve: by_peer(weights, solve, found, "all"))  # type: ignore[misc]
    four = {"scheme": "int4", "block_size": 32}
    show("search, symmetric", lambda: engine(ours(weights, "all", **four)))
    show("search, asymmetric", lambda: engine(ours(weights, "all", **four, symmetric=False)))
    free = {"scheme": "int4", "symmetric": False, "solver": "gptq"}
    for size in (32, 64, 128):
        show(
            f"ours, blocks of {size}", lambda size=size: engine(ours(weights, "all", **free, block_size=size))
        )  # type: ignore[misc]
    even = {**free, "symmetric": True}
    show("ours, symmetric, blocks of 32", lambda: engine(ours(weights, "all", **even, block_size=32)))
    for kind in ("uniform", "modality", "token"):
        recipe = ours(weights, "decoder", **free, block_size=32)
        settings = replace(recipe.calibration, token_weights=kind)
        show(
            f"decoder: ours, token weights {kind}",
            lambda settings=settings, recipe=recipe: engine(replace(recipe, calibration=settings)),  # type: ignore[misc]
        )
    palettes = {"scheme": "palette4", "channel_scale": True}
    show("palettes, k-means", lambda: engine(ours(weights, "all", **palettes)))
    show("palettes, ours", lambda: engine(ours(weights, "all", **palettes, solver="gptq")))
    for part in ("vision", "decoder"):
        for name in ("coremltools RTN, asymmetric", "ONNX Runtime RTN, symmetric", "textbook GPTQ"):
            solve = peers(32)[name]
            show(f"{part}: {name}", lambda solve=solve, part=part: by_peer(weights, solve, found, part))  # type: ignore[misc]
        show(f"{part}: ours", lambda part=part: engine(ours(weights, part, **free, block_size=32)))  # type: ignore[misc]
    show("int8, everything", lambda: engine(load_recipe("int8")))
    vision8 = replace(load_recipe("int8"), quantize=(QuantizeRule(("vision.*",), "int8"), FLOAT))
    show("vision: int8", lambda: engine(vision8))
    return rows


if __name__ == "__main__":
    main()
