from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from fastvlm_convert.bundle import quantized_writer
from fastvlm_convert.bundle.folder import QUANTIZED_CHECKPOINT
from fastvlm_convert.bundle.quantized_writer import write_settings, write_weights
from fastvlm_convert.bundle.resumable import resumable_folder
from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.manifest import Source
from fastvlm_convert.pipeline import quantize
from fastvlm_convert.quantization.prepared_weights import prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.packing import pack
from fastvlm_convert.quantized.schemes import PaletteMatrix
from fastvlm_convert.quantized.sqnr import ErrorMeter
from fastvlm_convert.quantized.weight import PaletteWeight, QuantizedWeight
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import Weight
from tests.bundles import FP16, mixed_recipe, recipe
from tests.checkpoints import (
    GOLDEN,
    HF,
    LLAVA,
    SETS,
    edit_tensors,
    golden_checkpoint,
    read_tensors,
    tree_state,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All golden checkpoints, quantized."""
    folder = tmp_path_factory.mktemp("quantized")
    return {n: quantize(GOLDEN / n / "checkpoint", folder / n, recipe=mixed_recipe()) for n in SETS}


@pytest.mark.parametrize("name", SETS)
def test_the_safetensors_package_reads_the_engines_integers(made, name):
    tensors = load_file(made[name].output / "model.safetensors")
    expected = {}
    for key, weight in prepare_weights(plan_weights(golden_checkpoint(name), mixed_recipe())).weights.items():
        if isinstance(weight, Weight):
            expected[key] = weight.array().astype(np.float16)
            continue
        matrix = weight.read(0, weight.rows)
        expected[f"{key}.q"], expected[f"{key}.scale"] = pack(matrix.q, matrix.scheme.bits), matrix.scale
        if not matrix.scheme.symmetric:
            expected[f"{key}.zero_point"] = matrix.zero_point
    assert set(tensors) == set(expected)
    for key, array in expected.items():
        assert tensors[key].dtype == array.dtype
        np.testing.assert_array_equal(tensors[key], array, err_msg=key)


@pytest.mark.parametrize("name", SETS)
def test_what_the_checkpoint_says_of_itself_is_kept(made, name):
    ours, original = open_checkpoint(made[name].output), golden_checkpoint(name)
    assert ours.quantized is not None
    assert ours.config == original.config
    assert (ours.layout, ours.eos_token_ids, ours.image_mode) == (
        original.layout, original.eos_token_ids, original.image_mode,
    )  # fmt: skip
    assert ours.quantized.record.source.sha256 == content_hash(original.files)
    assert ours.quantized.record.recipe.common.image_size == original.config.vision.image_size
    assert ours.unused == ()
    assert ours.disagreements == original.disagreements
    for path in original.settings:
        assert (made[name].output / path.name).read_bytes() == path.read_bytes()


def test_repeated_it_gives_the_same_bytes(made, tmp_path):
    again = quantize(GOLDEN / HF / "checkpoint", tmp_path / "elsewhere", recipe=mixed_recipe()).output
    ours = {name: digest for name, (digest, _) in tree_state(made[HF].output).items()}
    assert {name: digest for name, (digest, _) in tree_state(again).items()} == ours


def test_the_errors_are_those_of_the_integers(made):
    floats = fold(golden_checkpoint(LLAVA).weights)
    weights = prepare_weights(plan_weights(golden_checkpoint(LLAVA), mixed_recipe())).weights
    for report in made[LLAVA].record.layers:
        weight = weights[f"{report.layer}.weight"]
        if isinstance(weight, Weight):
            assert (report.scheme, report.sqnr_db, report.squared_sum) == ("float", None, None)
            continue
        signal = floats[f"{report.layer}.weight"].array().astype(np.float64)
        noise = signal - weight.dense().array()
        assert report.sqnr_db == pytest.approx(10 * np.log10((signal**2).sum() / (noise**2).sum()), abs=0.01)
        assert report.squared_sum == pytest.approx((signal**2).sum(), rel=1e-5)


def test_a_large_one_lies_in_shards(made, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized_writer, "MAX_SHARD_BYTES", 100_000)
    output = quantize(GOLDEN / LLAVA / "checkpoint", tmp_path / "sharded", recipe=mixed_recipe()).output
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert not (output / "model.safetensors").exists()
    largest = max(path.stat().st_size for path in shards)
    assert largest <= 100_000
    sharded, whole = open_checkpoint(output), open_checkpoint(made[LLAVA].output)
    assert list(sharded.stored) != []
    for name, weight in whole.folded.items():
        ours = sharded.folded[name]
        dense = [w if isinstance(w, Weight) else w.dense() for w in (ours, weight)]
        np.testing.assert_array_equal(dense[0].array(), dense[1].array())
    for path in shards:
        with safe_open(path, "np") as file:  # the package checks offsets on its own
            assert list(file.keys())


def test_floats_that_the_dtype_cannot_hold_are_an_error(llava, tmp_path):
    name = "model.norm.weight"
    edit_tensors(llava, {name: read_tensors(llava)[name] * 0 + 1e5})
    with pytest.raises(RecipeError, match=r"'decoder\.norm\.weight' reaches 1e\+05, beyond float16's 65504"):
        quantize(llava, tmp_path / "out", recipe=mixed_recipe())
    assert not list(tmp_path.glob("out*"))


def test_palettes_are_kept_too(tmp_path):
    """Written and read like integers, whoever solves them."""
    checkpoint = golden_checkpoint(LLAVA)
    rules = (
        QuantizeRule(("*.gate_proj",), "palette6", group_size=8, channel_scale=True),
        QuantizeRule(("*.up_proj",), "palette4", group_size=16),
        QuantizeRule(("*",), "float"),
    )
    plans = plan_weights(checkpoint, replace(mixed_recipe(), quantize=rules))
    weights = dict(fold(checkpoint.weights))
    rng = np.random.default_rng(3)
    matrices = {}
    for plan in plans.layers:
        if plan.scheme is not None:
            scheme, (rows, columns) = plan.scheme, plan.shape
            matrix = PaletteMatrix(
                scheme,
                rng.integers(0, scheme.levels, (rows, columns), np.uint8),
                rng.standard_normal((scheme.num_groups(rows), scheme.levels)).astype(np.float16),
                rng.random(rows).astype(np.float16) if scheme.per_channel_scale else None,
            )
            name = f"{plan.layer}.weight"
            matrices[name] = matrix
            weights[name] = PaletteWeight(plan.shape, scheme, matrix.read)
    meter = ErrorMeter(fold(checkpoint.weights))
    output = tmp_path / "out"
    with resumable_folder(output, "key", False, [], QUANTIZED_CHECKPOINT) as work:
        write_weights(work, meter.view(weights), plans.recipe, meter, lambda share: None)
        write_settings(work, plans, Source("llava_qwen2", "0", "not_found"), "0")
    opened = open_checkpoint(output)
    assert len(matrices) == 4
    for name, matrix in matrices.items():
        found = opened.folded[name]
        assert isinstance(found, PaletteWeight)
        again = found.matrix()
        for part in ("indices", "palette", "scale"):
            np.testing.assert_array_equal(getattr(again, part), getattr(matrix, part))


def test_a_table_that_serves_as_head_is_stored_for_both(tmp_path):
    """The embedding's float16 is not enough where the head computes with float32."""
    settings = recipe(
        FP16, decoder={"storage": "float32", "compute": "float32"}, onnx={"shared_table": False}
    )
    rules = (QuantizeRule(("vision.*",), "int8"), QuantizeRule(("*",), "float"))
    settings = replace(settings, quantize=rules)
    for name, dtype in ((LLAVA, "float32"), ("tiny-llava-sharded", "float16")):
        output = quantize(GOLDEN / name / "checkpoint", tmp_path / name, recipe=settings).output
        assert open_checkpoint(output).stored["decoder.embed_tokens.weight"].dtype == dtype
    assert isinstance(open_checkpoint(output).folded["vision.stem.0.weight"], QuantizedWeight)
