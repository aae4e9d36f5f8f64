"""Equalized weights are another description of the same network."""

import numpy as np
import pytest
import torch

from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.weights.equalize import Pair, equalized, pairs
from fastvlm_convert.weights.fold import fold
from tests.checkpoints import LLAVA, golden_checkpoint


def weights() -> dict:
    return dict(fold(golden_checkpoint(LLAVA).weights))


def exponents(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    source = weights()
    return {
        pair.second: generator.integers(-6, 7, source[f"{pair.second}.weight"].shape[1]).astype(np.int8)
        for pair in pairs(source)
    }


def test_pairs_are_those_with_nothing_but_linear_operations_between():
    found = list(pairs(weights()))
    vision = golden_checkpoint(LLAVA).config.vision
    blocks = [(s, b, stage.mixer) for s, stage in enumerate(vision.stages) for b in range(stage.depth)]
    expected = set()
    for s, b, mixer in blocks:
        block = f"vision.stages.{s}.blocks.{b}"
        expected.add(Pair(f"{block}.ffn.conv", f"{block}.ffn.fc1"))
        if mixer == "attention":
            expected.add(Pair(f"{block}.norm", f"{block}.attention.qkv"))
            expected.add(Pair(f"{block}.attention.qkv", f"{block}.attention.proj"))
    assert set(found) == expected
    assert len(found) == len(expected)


@torch.no_grad()
def test_the_network_computes_the_same():
    """Bit by bit: nothing rounds a power of two, and sums are of the same terms."""
    config, before = golden_checkpoint(LLAVA).config, weights()
    after = equalized(before, exponents())
    changed = [n for n in before if not np.array_equal(before[n].array(), after[n].array())]
    assert {name.rpartition(".")[0] for name in changed} >= {pair.second for pair in pairs(before)}
    size = config.vision.image_size
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = [load_model(config, w, folded=True).encode_image(pixels) for w in (before, after)]
    torch.testing.assert_close(*tokens, rtol=1e-5, atol=1e-5)


def test_inputs_and_outputs_change_by_the_powers_that_were_asked_for():
    before, powers = weights(), exponents()
    after = equalized(before, powers)
    for pair in pairs(before):
        factors = np.exp2(powers[pair.second].astype(np.float32))
        name = f"{pair.second}.weight"
        first = after[name].array().reshape(before[name].shape[0], -1)
        second = before[name].array().reshape(before[name].shape[0], -1)
        if not pair.second.endswith("qkv"):  # whose rows are changed too
            np.testing.assert_array_equal(first, second * factors)
        bias = f"{pair.first}.bias"
        if bias in before and pair.first.endswith("conv"):
            np.testing.assert_array_equal(after[bias].array() * factors, before[bias].array())


def test_pairs_without_exponents_stay():
    before = weights()
    only = next(iter(pairs(before)))
    after = equalized(before, {only.second: exponents()[only.second]})
    touched = {f"{only.second}.weight", f"{only.first}.weight", f"{only.first}.bias"}
    for name, weight in before.items():
        if name not in touched:
            assert after[name] is weight


@pytest.mark.parametrize("rows", [(0, 1), (3, 7)])
def test_rows_are_read_alone(rows):
    after = equalized(weights(), exponents())
    for pair in pairs(after):
        weight = after[f"{pair.second}.weight"]
        np.testing.assert_array_equal(weight.read(*rows), weight.array()[slice(*rows)])
