"""Versions of kept results: who changes what a stage gives counts its version up, or old ones stay in use."""

import hashlib
import platform

import pytest

from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantization.stages import ANSWERS, SEARCHED, SOLVED
from fastvlm_convert.quantized.codec import matrix_tensors
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme
from tests.quantization.layers import weights

# The version of integers that are found without data, and a hash of some.
FOUND = (3, "0ba8ab1ef1f505baaba80e6b752daeb4")
SCHEMES = (
    *(AffineScheme(bits, size, symmetric) for bits, size, symmetric in (
        (4, 32, True), (4, 32, False), (4, 64, False), (4, 128, True), (4, None, True), (8, None, True),
        (8, 64, False),
    )),
    PaletteScheme(4, 16, per_channel_scale=False),
    PaletteScheme(6, 8, per_channel_scale=True),
)  # fmt: skip


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="other processors may round the last bit otherwise"
)
def test_other_integers_have_another_version():
    digest = hashlib.sha256()
    for seed, scheme in enumerate(SCHEMES):
        values = weights(seed, 64, 1024)
        is_affine = isinstance(scheme, AffineScheme)
        found = quantize_affine(values, scheme) if is_affine else palettize(values, scheme)
        for name, tensor in matrix_tensors(found).items():
            digest.update(name.encode() + tensor.tobytes())
    assert (SEARCHED.version[0], digest.hexdigest()[:32]) == FOUND, (
        "integers changed: count up SEARCHED in quantization/stages.py, and write both figures here"
    )


def test_solved_layers_depend_on_the_stages_before_them():
    assert SOLVED.version[1:] == (*ANSWERS.version, *SEARCHED.version)
