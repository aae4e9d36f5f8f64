"""The weights that a recipe with solvers makes of a checkpoint, and what is kept of them."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.metrics import kl_divergence, sqnr_db
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.quantization.answers import collect_samples, token_batch
from fastvlm_convert.quantization.calibration import Calibration, read_calibration
from fastvlm_convert.quantization.prepared_weights import (
    PreparedWeights,
    calibration_for,
    float_weights,
    prepare_weights,
    remembered_calibration,
)
from fastvlm_convert.quantization.score import Agreement, AnswerScore, load_score
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.weight import Weight, dense_view
from fastvlm_convert.recipe import Recipe, without_data
from fastvlm_convert.recipe_settings import QuantizeRule, RepairSettings
from fastvlm_convert.weights.source import WeightSource
from tests.bundles import mixed_recipe
from tests.checkpoints import LLAVA, edit_tensors, golden_checkpoint, read_tensors, tree_state
from tests.planted import DEMO
from tests.quantization.calibrated import DECODER, INT8, calibrated_recipe

CHECKPOINT = golden_checkpoint(LLAVA)
RECIPE = calibrated_recipe(DECODER, INT8, num_samples=2)


@pytest.fixture(scope="module")
def first() -> PreparedWeights:
    """Solved in the cache of the session."""
    return solved()


@pytest.fixture
def own_cache(first, tmp_path, monkeypatch) -> Path:
    """A copy of that cache, in which nothing but `first` is solved."""
    common = Path(os.environ["FASTVLM_CONVERT_CACHE"])
    folder = Path(shutil.copytree(common / "answers", tmp_path / "cache" / "answers")).parent
    (kept,) = {
        path.parent for path in common.glob("solved/*/*/answers.json") if load_score(path) == first.score
    }
    shutil.copytree(kept, folder / kept.relative_to(common))
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(folder))
    return folder


def solved(recipe: Recipe = RECIPE, checkpoint=CHECKPOINT, source: Path | None = None) -> PreparedWeights:
    plan = plan_weights(checkpoint, recipe)
    return prepare_weights(plan, calibration_for(plan, source))


def folders(cache: Path) -> list[Path]:
    return sorted(cache.glob("solved/*/*"))


def integers(engine: PreparedWeights, prefix: str = "") -> dict[str, np.ndarray]:
    """What is stored of all quantized weights, or of those whose names begin so."""
    quantized = {
        n: w for n, w in engine.weights.items() if not isinstance(w, Weight) and n.startswith(prefix)
    }
    return {name: weight.read(0, weight.rows).q for name, weight in quantized.items()}


def unread(weights: WeightSource) -> WeightSource:
    """Weights that must not be read."""
    return {
        n: replace(w, read=lambda start, stop: pytest.fail("a weight was read")) for n, w in weights.items()
    }


class TestKept:
    def test_the_second_time_nothing_is_run(self, first, own_cache):
        before = tree_state(own_cache)
        second = prepare_weights(
            plan_weights(replace(CHECKPOINT, weights=unread(CHECKPOINT.weights)), RECIPE),
            Calibration((), read_calibration(None, RECIPE.calibration, CHECKPOINT.tokenizer).sha256),
            lambda stage, share: pytest.fail(f"{stage} ran"),
        )
        after = tree_state(own_cache)
        assert after.keys() == before.keys()
        assert {n: s for n, s in after.items() if "about" not in n} == {  # whose time is that of the last use
            n: s for n, s in before.items() if "about" not in n
        }
        assert first.score == second.score
        stored, expected = (integers(engine, "decoder.layers.") for engine in (second, first))
        assert len(stored) == 14
        assert all(np.array_equal(stored[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("change", ["damping", "rules", "data", "repairs", "image_size", "checkpoint"])
    def test_what_it_depends_on(self, own_cache, llava, change):
        (other,) = folders(own_cache)
        before = tree_state(other)
        recipe, checkpoint = RECIPE, CHECKPOINT
        match change:
            case "damping":
                recipe = replace(recipe, calibration=replace(recipe.calibration, damping=0.02))
            case "rules":
                recipe = replace(recipe, quantize=(replace(DECODER, symmetric=True), INT8))
            case "data":
                recipe = replace(recipe, calibration=replace(recipe.calibration, num_samples=1))
            case "repairs":
                recipe = replace(recipe, repairs=RepairSettings(residual_shift=2))
            case "image_size":
                recipe = replace(recipe, common=replace(recipe.common, image_size=320))
            case "checkpoint":
                name = "model.layers.0.mlp.up_proj.weight"
                edit_tensors(llava, {name: read_tensors(llava)[name] * 1.5})
                checkpoint = open_checkpoint(llava)
        solved(recipe, checkpoint)
        assert len(folders(own_cache)) == 2
        assert tree_state(other) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda r: replace(r, name="other", description="Another.", notes=("Beware.",)),
            lambda r: replace(r, gates=replace(r.gates, max_new_tokens=3)),
            lambda r: replace(r, onnx=replace(r.onnx, shared_table=False)),
            lambda r: replace(r, coreml=replace(r.coreml, attention="decomposed")),
            lambda r: replace(r, common=replace(r.common, max_context_length=128)),
            lambda r: replace(r, repairs=RepairSettings(float32_scores=(0,), separate_key_bias=(1,))),
            lambda r: replace(r, quantize=(replace(DECODER, layers=("decoder.layers.[01].*",)), INT8)),
            lambda r: replace(r, quantize=(replace(DECODER, on_indivisible="float"), INT8)),
        ],
    )
    def test_what_it_does_not_depend_on(self, own_cache, change):
        """Names, gates, targets, and rules that say the same in other words."""
        solved(change(RECIPE))
        assert len(folders(own_cache)) == 1

    def test_fresh_caches_hold_the_same_bytes(self, tmp_path, monkeypatch):
        found = []
        for name in ("a", "b"):
            monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / name))
            solved(replace(RECIPE, calibration=replace(RECIPE.calibration, awq=True)))
            found.append(
                {path: digest for path, (digest, _) in tree_state(tmp_path / name / "solved").items()}
            )
        assert found[0] == found[1]
        assert len(found[0]) == 17  # 14 layers, their coverage, the score, and what they are of

    @pytest.mark.parametrize(
        "damage", ["layer gone", "layer empty", "score empty", "score cut", "score gone"]
    )
    def test_what_is_damaged_is_made_again(self, first, own_cache, damage):
        (folder,) = folders(own_cache)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        what, how = damage.split()
        path = folder / (
            "answers.json" if what == "score" else "decoder.layers.1.self_attn.k_proj.safetensors"
        )
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(b"" if how == "empty" else before[path.name][:20])
        again = solved()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert again.score == first.score
        ours, expected = integers(again), integers(first)
        assert all(np.array_equal(ours[name], expected[name]) for name in expected)


class TestRefused:
    def test_data_that_is_not_at_hand(self, own_cache):
        recipe = replace(RECIPE, calibration=replace(RECIPE.calibration, damping=0.3))
        with pytest.raises(RecipeError, match="calibrated with data that is not at hand") as caught:
            prepare_weights(plan_weights(CHECKPOINT, recipe), Calibration((), "0" * 64))
        assert "give the quantized checkpoint" in str(caught.value.hint)
        assert len(folders(own_cache)) == 1

    def test_no_data_at_all(self):
        with pytest.raises(RecipeError, match="needs data to calibrate with, and none is recorded"):
            prepare_weights(plan_weights(CHECKPOINT, RECIPE), None)

    def test_data_that_is_not_needed(self, tmp_path, golden_quantized):
        with pytest.raises(
            RecipeError, match=r"nothing to calibrate: no solver of recipe 'mixed' needs data"
        ):
            calibration_for(plan_weights(CHECKPOINT, mixed_recipe()), tmp_path)
        with pytest.raises(RecipeError, match="nothing to calibrate: the checkpoint is quantized already"):
            calibration_for(plan_weights(open_checkpoint(golden_quantized), mixed_recipe()), tmp_path)

    @pytest.mark.parametrize(
        ("layers", "what"),
        [
            ("decoder.embed_tokens", "a layer of a block, not the table of the embedding or the head"),
            ("vision.stem.0", "a matrix or a 1x1 convolution, not one of 3 x 3"),
        ],
    )
    def test_layers_that_no_data_reaches(self, layers, what):
        rule = QuantizeRule((layers,), "int8", solver="gptq")
        with pytest.raises(RecipeError, match=f"'{layers}', but solver gptq needs {what}"):
            solved(replace(RECIPE, quantize=(rule, DECODER, INT8)))


def test_remembered_data():
    plan = plan_weights(CHECKPOINT, RECIPE)
    assert remembered_calibration(plan, None) is None
    default = read_calibration(None, RECIPE.calibration, CHECKPOINT.tokenizer)
    assert remembered_calibration(plan, default.sha256) == default
    assert remembered_calibration(plan, "0" * 64) == Calibration((), "0" * 64)


def test_without_solvers_nothing_is_calibrated():
    plan = plan_weights(CHECKPOINT, without_data(RECIPE))
    assert calibration_for(plan, None) is None
    found = prepare_weights(plan)
    assert found.score is None
    assert {n for n in found.weights if found.floats[n] is not found.weights[n]} == set(integers(found))


def test_the_score_is_of_the_model_with_all_its_integers(first):
    """Its parts, the encoder's too, through a model that holds the dequantized weights; what is held out."""
    plan = plan_weights(CHECKPOINT, RECIPE)
    data = calibration_for(plan, None)
    reference, candidate = (
        logits(float_weights(plan), data, held_out=True),
        logits(dense_view(first.weights), data, held_out=True),
    )
    kl = float(kl_divergence(reference, candidate).mean())
    top1 = float((reference.argmax(1) == candidate.argmax(1)).mean())
    found = Agreement(pytest.approx(kl, rel=1e-3), pytest.approx(top1), len(reference), 1)
    assert first.score == AnswerScore(found, True, None, found)  # the last sample, a text


def test_what_is_held_out_changes_no_integer(own_cache, first):
    """The last of few samples is: with another answer all integers are the same, and the score is not."""
    data = calibration_for(plan_weights(CHECKPOINT, RECIPE), None)
    kept, *others, held_out = data.questions

    def with_answers(*answers: str | None) -> PreparedWeights:
        questions = (replace(kept, answer=answers[0]), *others, replace(held_out, answer=answers[1]))
        return prepare_weights(plan_weights(CHECKPOINT, RECIPE), Calibration(questions, repr(answers)))

    other = with_answers(None, "A red dog, and a cat.")
    for name, q in integers(first).items():
        np.testing.assert_array_equal(integers(other)[name], q)
    assert other.score != first.score
    changed = integers(with_answers("A red dog, and a cat.", None))
    assert any(not np.array_equal(changed[name], q) for name, q in integers(first).items())


def test_of_a_single_sample_nothing_is_held_out(own_cache):
    found = solved(calibrated_recipe(DECODER, INT8, num_samples=1))
    assert not found.score.is_held_out


def test_scaled_layers_are_compared_with_scaled_floats():
    plan = plan_weights(
        CHECKPOINT, replace(RECIPE, calibration=replace(RECIPE.calibration, num_samples=3, awq=True))
    )
    data = calibration_for(plan, None)
    scaled = prepare_weights(plan, Calibration(data.questions[:3], "three pictures"))
    floats = float_weights(plan_weights(CHECKPOINT, RECIPE))
    name = "decoder.layers.0.mlp.up_proj.weight"
    found = dense_view(scaled.weights)[name].array()
    assert sqnr_db(scaled.floats[name].array(), found) > sqnr_db(floats[name].array(), found) + 1
    o_proj = "decoder.layers.0.self_attn.o_proj.weight"
    np.testing.assert_array_equal(scaled.floats[o_proj].array(), floats[o_proj].array())


@torch.no_grad()
def logits(
    weights, data: Calibration, checkpoint=CHECKPOINT, recipe: Recipe = RECIPE, held_out: bool = False
) -> np.ndarray:
    """What predicts the answers' tokens, of a model that holds some weights; float32 [tokens, vocab]."""
    said = collect_samples(plan_weights(checkpoint, recipe), data)
    chain = BlockStreamer(checkpoint.config, weights)
    x = torch.cat(list(said.pictures))
    for block in chain.vision_blocks():
        x = chain.run(chain.load(block), x)
    batch = token_batch(said.samples, x, chain.embed)
    x = batch.embeds
    for block in chain.decoder_blocks():
        x = chain.run(chain.load(block), x)
    sample, token = batch.answers
    judged = sample >= said.num_fitted if held_out else slice(None)
    return chain.logits(x[sample[judged], token[judged]]).numpy()


@pytest.mark.slow
def test_gptq_beats_the_search_on_the_demos_answers():
    checkpoint = open_checkpoint(DEMO)
    rule = replace(DECODER, block_size=32)
    recipe = calibrated_recipe(rule, QuantizeRule(("*",), "float"), num_samples=12, max_tokens=384)
    more = read_calibration(None, replace(recipe.calibration, num_samples=20), checkpoint.tokenizer)
    seen, unseen = more.questions[:12], Calibration(more.questions[12:], "unseen")
    gptq = solved(recipe, checkpoint)
    search = prepare_weights(plan_weights(checkpoint, without_data(recipe)))

    def compared(engine: PreparedWeights, data: Calibration) -> tuple[float, float]:
        """Divergence, and signal to noise of the logits but for their means."""
        sources = (float_weights(plan_weights(checkpoint, recipe)), dense_view(engine.weights))
        reference, candidate = (logits(weights, data, checkpoint, recipe) for weights in sources)
        kl = float(kl_divergence(reference, candidate).mean())
        centred = (found - found.mean(1, keepdims=True) for found in (reference, candidate))
        return kl, sqnr_db(*centred)

    fitted = Calibration(tuple(q for n, q in enumerate(seen) if n != 9), "all but the tenth")
    assert compared(gptq, fitted)[0] < 0.2 * compared(search, fitted)[0]
    assert compared(gptq, unseen)[1] > compared(search, unseen)[1] + 1
