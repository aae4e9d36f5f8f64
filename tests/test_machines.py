"""Outputs do not depend on the machine: its processor, its number of threads, the rows read at a time.

Another processor is played by numpy and OpenBLAS, which choose among kernels: they are told to leave out what
newer processors have. `benchmarks/bundle_hashes.py` compares whole outputs between real machines.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.adapters import wide_adapter
from tests.bundles import mixed_recipe, write_recipe
from tests.checkpoints import GOLDEN, HF, LLAVA, SHARDED, read_tensors, remove_weights
from tests.planted import DEMO
from tests.views import all_views, digest

FOUND = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
NEWER = [name for name in FOUND if name.startswith("AVX512")]
# A level is what to leave out, whose BLAS kernels to take, and how many threads.
LEVELS = {
    "newest": ([], None, 1),
    "avx2": (NEWER, "Haswell", 2),
    "sse": (FOUND, "Nehalem", 1),
    "oldest": (FOUND, "Prescott", 2),
}


def environment(level: str) -> dict[str, str]:
    without, kernels, threads = LEVELS[level]
    changes = {"NPY_DISABLE_CPU_FEATURES": " ".join(without), "OMP_NUM_THREADS": str(threads)}
    if kernels is not None:
        changes |= {"OPENBLAS_CORETYPE": kernels}
    return {**os.environ, **changes}


def run(level: str, *arguments: object) -> str:
    """Standard output of Python run as on another machine."""
    call = [sys.executable, *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment(level))
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_strides(folder: Path) -> Path:
    """A checkpoint stored by torch, every matrix the other way round in memory."""
    tensors = read_tensors(folder)
    remove_weights(folder)
    turned = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in tensors.items()}
    torch.save(turned, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def adapted(llava, tmp_path):
    """A checkpoint and an adapter."""
    return with_strides(llava), wide_adapter(
        tmp_path / "adapter", read_tensors(GOLDEN / LLAVA / "checkpoint")
    )


def test_rows_are_the_same_whatever_is_read_with_them(adapted):
    for name, weight in all_views(*adapted).items():
        whole, count = weight.array(), weight.shape[0]
        for start, stop in ((0, 1), (1, 4), (count // 2, count // 2 + 7), (count - 5, count), (3, count - 2)):
            first, last = max(0, start), min(stop, count)
            if first < last:
                np.testing.assert_array_equal(weight.read(first, last), whole[first:last], err_msg=name)


def test_weights_are_the_same_on_other_processors(adapted):
    digests = {level: run(level, "-m", "tests.views", *adapted).strip() for level in LEVELS}
    assert digests == dict.fromkeys(LEVELS, digest(*adapted))


EXPORT = """
import sys
from pathlib import Path
from fastvlm_convert.cli.main import main
output, checkpoint, adapter, *recipes = sys.argv[1:]
for recipe in recipes:
    # ONNX Runtime lacks palettes, and the rotary attention of heads of 8.
    targets = ["coreml"] if recipe == "ios-ane" or "sharded" in checkpoint else ["coreml", "onnx"]
    options = ["--recipe", recipe, "--calibration", "none", "--adapter", adapter, "--quiet"]
    options += [word for target in targets for word in ("--target", target)]
    assert main(["export", checkpoint, *options, "-o", f"{output}/{Path(recipe).stem}"]) == 0, recipe
"""


def exported(level: str, output: Path, *arguments: object) -> dict[str, str]:
    """Hash of every file of the bundles that one process makes."""
    output.mkdir()
    run(level, "-c", EXPORT, output, *arguments)
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [LLAVA, HF, SHARDED, "demo"])
def test_bundles_are_the_same_on_other_processors(name, tmp_path):
    checkpoint = DEMO if name == "demo" else GOLDEN / name / "checkpoint"
    adapter = wide_adapter(tmp_path / "adapter", read_tensors(checkpoint))
    mixed = write_recipe(mixed_recipe(), tmp_path / "mixed.yaml")
    recipes = ["fp32", "fp16", "int8", "int4", "ios-ane"] if name == "demo" else ["fp32", "fp16", mixed]
    made = {level: exported(level, tmp_path / level, checkpoint, adapter, *recipes) for level in LEVELS}
    for level, files in made.items():
        assert len(files) > 10 * len(recipes)
        assert files == made["newest"], level
