"""A decoder in several packages: the same answers bit for bit, and no package above the limit."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.bundle.constants.contract import client_contract
from fastvlm_convert.errors import BundleError, RecipeError, TargetError
from fastvlm_convert.estimate.workload import target_work
from fastvlm_convert.exporters.coreml.sizes import coreml_dry_run
from fastvlm_convert.lint.run import lint
from fastvlm_convert.manifest import FILE_NAME, load_manifest
from fastvlm_convert.pipeline import export
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.recipe import Recipe, load_recipe
from fastvlm_convert.recipe_settings import CoreMLSettings
from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.weights.published import published_config
from tests.bundles import recipe

DEMO = Path(__file__).parents[3] / "checkpoints/fastvlm-demo"  # four layers of 1.2 MB, a head of 0.2 MB
VARIANTS = {
    "fixed": {},
    "range": {"sequence_lengths": "range"},
    "enumerated": {"sequence_lengths": "enumerated"},
    "tensors": {"kv_cache": "tensors"},
}


def settings(limit: object, **coreml: object) -> Recipe:
    """Halves, whose residual stream is float32 in places, so that packages hand over either."""
    return recipe(
        "fp16",
        decoder={"float32_ops": ("l0_*residual",)},
        coreml={"split_larger_than_mb": limit, **coreml},
    )


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """One decoder whole, and in packages."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, limit in (("whole", "never"), ("split", 3)):
        export(DEMO, folder / name, recipe=settings(limit, **VARIANTS[request.param]), targets=["coreml"])
    return folder / "whole", folder / "split"


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("split") / "bundle"
    export(DEMO, folder, recipe=settings(2), targets=["coreml"])
    return folder


@pytest.mark.parametrize("precision", ["exact", "device"])
def test_it_answers_bit_for_bit_as_one_package_does(pair, precision):
    rng = np.random.default_rng(0)
    ids, following = rng.integers(0, 335, 90), rng.integers(0, 335, 3)  # a chunk of 64, and a padded one
    given = []
    for bundle in pair:
        session = load_bundle(bundle, "coreml", precision=precision).session
        for _ in range(2):  # a second sequence starts from nothing
            rows = session.embed(ids)
            logits = [session.prefill(rows)]
            logits += [session.decode(session.embed(following[i : i + 1])) for i in range(len(following))]
        given.append(np.stack([*logits]))
    np.testing.assert_array_equal(given[1], given[0])


def test_packages_are_as_few_as_the_limit_allows_and_none_exceeds_it(pair, split):
    whole, halves = pair
    assert packages(whole) == ["decoder", "vision"]
    assert packages(halves) == ["decoder", "decoder_1", "vision"]
    assert packages(split) == ["decoder", "decoder_1", "decoder_2", "decoder_3", "vision"]
    for bundle, limit in ((halves, 3_000_000), (split, 2_000_000)):
        sizes = [path.stat().st_size for path in bundle.glob("coreml/decoder*/Data/*/weights/weight.bin")]
        assert max(sizes) <= limit < sum(sizes)
    functions = [a.function for a in load_manifest(split).artifacts if a.component == "decoder"]
    assert functions == [
        "decode_1", "prefill_1", "decode_2", "prefill_2", "decode_3", "prefill_3", "decode", "prefill",
    ]  # fmt: skip


def test_no_weight_is_stored_twice(split):
    assert not [f for f in lint(split).findings if f.id == "duplicated-tensor"]


def test_the_work_is_that_of_one_package(pair):
    works = [target_work(bundle, load_manifest(bundle), "coreml") for bundle in pair]
    assert works[0].prefill.macs == works[1].prefill.macs
    assert works[0].decode_at_context.macs == works[1].decode_at_context.macs
    assert works[0].cache_bytes == works[1].cache_bytes
    weights = [work.decode_at_context.weight_bytes for work in works]
    assert weights[1] == pytest.approx(weights[0], rel=0.01)  # the columns of the mask, once more


@pytest.mark.parametrize("missing", ["decode_1", "prefill_2", "decode"])
def test_a_chain_with_a_gap_is_refused(split, tmp_path, missing):
    manifest = json.loads((split / FILE_NAME).read_text())
    manifest["artifacts"] = [a for a in manifest["artifacts"] if a["function"] != missing]
    (tmp_path / FILE_NAME).write_text(json.dumps(manifest))
    for name in manifest["files"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).hardlink_to(split / name)
    with pytest.raises(BundleError, match="malformed manifest"):
        load_bundle(tmp_path, "coreml")


def test_the_swift_example_runs_whole_decoders_only(split):
    with pytest.raises(TargetError, match="no constants for a decoder in several packages"):
        client_contract(load_manifest(split), "0" * 64, "coreml")


def test_a_limit_below_one_layer_says_what_is_needed(tmp_path):
    with pytest.raises(RecipeError, match=r"layer 3, with what must be in its package, takes 1\.6") as e:
        export(DEMO, tmp_path / "bundle", recipe=settings(1), targets=["coreml"])
    assert e.value.hint == "allow 2 or more, or fewer bits"
    assert not (tmp_path / "bundle").exists()


def test_a_limit_that_makes_no_sense():
    with pytest.raises(RecipeError, match="split_larger_than_mb is 0, expected at least 1, or 'never'"):
        CoreMLSettings(split_larger_than_mb=0)


@pytest.mark.parametrize(("size", "count"), [("0.5b", 1), ("1.5b", 1), ("7b", 5)])
def test_ios_ane_keeps_every_package_below_a_gigabyte(size, count):
    config, ane = published_config(size), load_recipe("ios-ane")
    shapes = {name: weight.shape for name, weight in placeholder_weights(config, ()).items()}
    _, sizes = coreml_dry_run(config, placeholder_weights(config, plan_layers(shapes, ane)), ane, None)
    weights = [n for name, n in sizes.items() if name.startswith("coreml/decoder") and name.endswith(".bin")]
    assert len(weights) == count
    assert max(weights) <= 1_000_000_000


def packages(bundle: Path) -> list[str]:
    return sorted(path.stem for path in (bundle / "coreml").glob("*.mlpackage"))
