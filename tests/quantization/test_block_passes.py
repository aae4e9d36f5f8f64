"""The compiled passes against NumPy, and what they promise of bits, folders and processes."""

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.quantization import block_passes
from fastvlm_convert.quantization.candidates import storable
from tests.quantization.layers import weights

# Integers of blocks and of whole rows, with and without importance, as a hash.
SEARCH = """
import hashlib
import numpy as np
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantized.schemes import AffineScheme
from tests.quantization.layers import weights

digest = hashlib.sha256()
for seed, (bits, size, symmetric) in enumerate(((4, 64, False), (8, 128, True), (8, None, True))):
    importance = np.random.default_rng(seed).gamma(0.5, size=1152).astype(np.float32)
    for given in (None, importance):
        found = quantize_affine(weights(seed, 80, 1152), AffineScheme(bits, size, symmetric), given)
        for tensor in (found.q, found.scale, found.zero_point):
            digest.update(tensor.tobytes())
print(digest.hexdigest())
"""


def searched(cache: Path, script: str = SEARCH, **environment: str) -> subprocess.Popen[str]:
    """A process that searches, with a folder of its own for compiled code."""
    given = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hash_of(process: subprocess.Popen[str]) -> str:
    """What it printed."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip()


@pytest.fixture(scope="module")
def expected() -> str:
    """The hash as this process has it."""
    found: dict[str, str] = {}
    exec(SEARCH, {"print": lambda text: found.update(hash=text)})
    return found["hash"]


def in_turn(products: np.ndarray) -> np.ndarray:
    """Sums over the first axis, each number added to the sum of those before it, in float32."""
    return np.add.accumulate(products, axis=0, dtype=np.float32)[-1]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (16, 700), (64, 257), (128, 33), (4864, 5)])
def test_sums_are_those_of_numpy_in_order(size: int, count: int) -> None:
    rng = np.random.default_rng(size)
    blocks = weights(size, size, count)
    blocks[:, 0] = 0
    roots = np.sqrt(rng.gamma(0.5, size=blocks.shape)).astype(np.float32)
    scale = (0.01 * rng.uniform(0.5, 2, (3, count)) * rng.choice([-1, 1], (3, count))).astype(np.float32)
    zero = rng.integers(0, 16, scale.shape).astype(np.float32)
    inverse, low, high = np.reciprocal(scale), -zero, np.float32(15) - zero
    norm = np.empty(count, np.float32)
    block_passes.sum_squares(blocks, norm)
    np.testing.assert_array_equal(norm, in_turn(blocks * blocks))
    plain, weighted = np.empty((2, 3, 3, count), np.float32)
    block_passes.sum_errors(blocks, norm, scale, zero, np.float32(15), plain)
    block_passes.sum_weighted_errors(blocks, roots, scale, zero, np.float32(15), weighted)
    for number in range(3):
        exact = blocks * inverse[number]
        steps = np.clip(np.rint(exact), low[number], high[number])
        left = exact - steps
        pp, rr = in_turn(steps * steps), in_turn(left * left)
        np.testing.assert_array_equal(plain[0, number], pp)
        np.testing.assert_array_equal(plain[1, number], rr)
        cross = (norm / scale[number] / scale[number] - pp - rr) / 2
        np.testing.assert_array_equal(plain[2, number], np.where(pp == 0, 0, cross))
        steps, left = steps * roots, left * roots
        np.testing.assert_array_equal(weighted[0, number], in_turn(steps * steps))
        np.testing.assert_array_equal(weighted[1, number], in_turn(left * left))
        np.testing.assert_array_equal(weighted[2, number], in_turn(steps * left))


def test_scales_are_rounded_to_float16_as_numpy_does() -> None:
    """What lies between two of float16's numbers, its neighbors, subnormals, and what is out of range."""
    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    between = (halves[1:] + halves[:-1]) / 2
    near = [np.nextafter(between, np.float32(limit)) for limit in (0, np.inf)]
    scale = np.concatenate([halves[1:], between, *near, np.float32([2**-26, 9e4])])
    scale = np.concatenate([scale, -scale])[None]
    sums = np.zeros((3, *scale.shape), np.float32)
    sums[0] = 1  # a try without error is fitted as it is
    best = np.full((4, scale.size), np.inf, np.float32)
    block_passes.keep_best(scale, np.zeros_like(scale), sums, best)
    np.testing.assert_array_equal(best[0], storable(scale[0]))


def test_of_equal_tries_the_first_is_kept() -> None:
    scale = np.float32([[3, 3], [1, 2], [1, 2], [0.5, 4]])
    zero = np.float32([[0, 0], [1, 1], [2, 2], [3, 3]])
    sums = np.zeros((3, 4, 2), np.float32)
    sums[0], sums[1] = 1, 1
    best = np.full((4, 2), np.inf, np.float32)
    block_passes.keep_best(scale[:3], zero[:3], sums[:, :3].copy(), best)
    np.testing.assert_array_equal(best, [[1, 2], [1, 1], [1, 4], [1, 2]])
    block_passes.keep_best(scale[3:], zero[3:], sums[:, 3:].copy(), best)
    np.testing.assert_array_equal(best, [[0.5, 2], [3, 1], [0.25, 4], [0.5, 2]])


@pytest.mark.parametrize(("count", "size"), [(1, 1), (15, 64), (700, 17), (16, 4864)])
def test_blocks_are_turned_and_rounded(count: int, size: int) -> None:
    rng = np.random.default_rng(size)
    rows = weights(size, count, size)
    blocks = np.empty((size, count), np.float32)
    block_passes.transpose(rows, blocks)
    np.testing.assert_array_equal(blocks, rows.T)
    inverse = rng.uniform(-9000, 9000, count).astype(np.float32)
    zero = rng.integers(0, 256, count).astype(np.float32)
    q = np.empty(rows.shape, np.uint8)
    block_passes.round_blocks(rows, inverse, zero, np.float32(255), q)
    steps = np.rint(rows * inverse[:, None])
    np.testing.assert_array_equal(q, np.clip(steps + zero[:, None], 0, 255))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for other x86-64 processors")
@pytest.mark.parametrize(
    ("processor", "features"), [("x86-64", ""), ("haswell", "+avx2,+fma"), ("skylake-avx512", "")]
)
def test_other_processors_find_the_same(processor: str, features: str, expected: str, tmp_path: Path) -> None:
    """They have vectors of 128, 256 and 512 bits, and the last two one operation for `a * b + c`."""
    if processor == "skylake-avx512" and "avx512" not in Path("/proc/cpuinfo").read_text(encoding="ascii"):
        pytest.skip("this processor cannot run it")
    process = searched(tmp_path, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES=features)
    assert hash_of(process) == expected


def test_processes_may_compile_at_the_same_time(expected: str, tmp_path: Path) -> None:
    assert {hash_of(process) for process in [searched(tmp_path) for _ in range(3)]} == {expected}
    kept = {path: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.rglob("*.nb*")}
    assert len(kept) == 2 * 6  # an index and code of each function
    assert hash_of(searched(tmp_path)) == expected
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in kept} == kept


@pytest.mark.parametrize("reason", ["no folder", "full disk"])
def test_it_works_where_nothing_can_be_kept(reason: str, expected: str, tmp_path: Path) -> None:
    """As in a container whose folders are all read-only."""
    if reason == "no folder":
        (tmp_path / "file").touch()
        only = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
        process = searched(tmp_path / "file" / "folder", **only)
    else:
        no_bytes = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        process = searched(tmp_path, no_bytes + SEARCH)
    assert hash_of(process) == expected
