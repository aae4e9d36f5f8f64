"""Fixtures of the whole suite."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from fastvlm_convert.pipeline import export, quantize
from fastvlm_convert.recipe import load_recipe, without_data
from tests.bundles import (
    FP16,
    FP32,
    copy_bundle,
    edit_manifest,
    export_bundle,
    mixed_recipe,
    recipe,
)
from tests.checkpoints import GOLDEN, HF, LLAVA, SHARDED, copy_checkpoint
from tests.planted import DEMO

# The models are tiny: a second thread saves nothing, and on a busy machine waiting for it costs seconds.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network; those of the hub have a server of their own

# The same examples every time and no clock: a run must not fail because the machine is busy.
hypothesis.settings.register_profile(
    "suite",
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make soak` tries everything that `make test` tries a sample of."""
    parser.addoption("--soak", action="store_true", help="long versions of fuzzes and kills")


def pytest_configure(config: pytest.Config) -> None:
    """Other examples every time, and many."""
    if config.getoption("--soak"):
        hypothesis.settings.register_profile("soak", max_examples=4000, database=None, deadline=None)
        hypothesis.settings.load_profile("soak")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the user's cache holds must not change what tests see."""
    os.environ["FASTVLM_CONVERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """A writable checkpoint in Apple's layout: float32, tied, one safetensors file."""
    return copy_checkpoint(LLAVA, tmp_path)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A writable checkpoint in transformers' layout: float32, tied, padded vocabulary."""
    return copy_checkpoint(HF, tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A writable checkpoint in Apple's layout: bfloat16, untied, three shards with an index."""
    return copy_checkpoint(SHARDED, tmp_path)


@pytest.fixture(scope="session")
def fp32_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 bundle of the golden checkpoint in Apple's layout; copy it before changing it."""
    output = tmp_path_factory.mktemp("bundles") / FP32
    return export_bundle(GOLDEN / LLAVA / "checkpoint", output, recipe(FP32))


@pytest.fixture(scope="session")
def fp16_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float16 bundle of the same checkpoint; copy it before changing it."""
    output = tmp_path_factory.mktemp("bundles") / FP16
    return export_bundle(GOLDEN / LLAVA / "checkpoint", output, recipe(FP16))


@pytest.fixture(scope="session")
def golden_quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in Apple's layout, quantized by `mixed_recipe`; copy it before changing it."""
    output = tmp_path_factory.mktemp("quantized") / "mixed"
    quantize(GOLDEN / LLAVA / "checkpoint", output, recipe=mixed_recipe())
    return output


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in four bits, as ONNX: it answers sensibly; copy it before changing it."""
    output = tmp_path_factory.mktemp("served") / "demo"
    export(DEMO, output, recipe=without_data(load_recipe("int4")), targets=["onnx"])
    return output


@pytest.fixture(scope="session")
def endless_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with an end token that it never says, for answers of any length."""
    bundle = copy_bundle(demo_bundle, tmp_path_factory.mktemp("endless"))
    edit_manifest(bundle, lambda manifest: manifest["contract"].update(eos_token_ids=[0]))
    return bundle
