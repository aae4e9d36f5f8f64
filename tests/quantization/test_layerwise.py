"""Layers solved in turn: on what, into what, and again after an interruption."""

import numpy as np
import pytest
import torch

from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.quantization import block_solver, layer_solver
from fastvlm_convert.quantization.awq import behind_scales
from fastvlm_convert.quantization.limits import has_fine_encoder
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.parts import is_language
from fastvlm_convert.weights.source import Weight
from tests.checkpoints import LLAVA, golden_checkpoint, tree_state
from tests.quantization.calibrated import (
    DECODER,
    INT4,
    INT8,
    RULES,
    Run,
    calibrated_recipe,
    floats,
    golden_answers,
    golden_batch,
    golden_hidden,
    golden_weights,
    hidden_of,
    plans_of,
    run,
    sqnr,
)

CONFIG = golden_checkpoint(LLAVA).config
GATE, UP = (f"decoder.layers.0.mlp.{name}_proj" for name in ("gate", "up"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("plain") / "solved", calibrated_recipe())


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("scaled") / "solved", calibrated_recipe(awq=True))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return sqnr(a, b) > 90


class TestWhatComesOut:
    def test_every_layer_that_was_asked_for(self, plain):
        asked = {f"{p.layer}.weight" for p in plans_of(calibrated_recipe()) if p.solver != "search"}
        found = plain.solved.weights
        assert {name for name, weight in found.items() if not isinstance(weight, Weight)} == asked
        assert any(name.startswith("vision.final.se") for name in asked)
        changed = {name for name, weight in found.items() if isinstance(weight, Weight)}
        assert changed == {name.replace(".weight", ".bias") for name in asked} & set(floats())

    @pytest.mark.parametrize("name", ["plain", "scaled"])
    def test_the_samples_went_through_what_is_stored(self, request, name):
        found = request.getfixturevalue(name)
        assert close(found.hidden(), found.solved.hidden)

    @pytest.mark.parametrize("name", ["plain", "scaled"])
    def test_a_part_of_the_samples_solves_and_all_go_through(self, request, name, tmp_path, monkeypatch):
        whole = request.getfixturevalue(name)
        monkeypatch.setattr(block_solver, "MAX_ACTIVATION_BYTES", 1)
        one = run(tmp_path / "one", calibrated_recipe(awq=name == "scaled"))
        assert close(one.hidden(), one.solved.hidden)
        assert len(one.solved.hidden) == len(whole.solved.hidden)
        assert one.files != whole.files  # other samples, other integers
        again = run(whole.task.folder, calibrated_recipe(awq=name == "scaled"))  # nothing is left to solve
        assert close(again.solved.hidden, whole.solved.hidden)

    def test_fine_integers_change_little(self, tmp_path):
        fine = {"scheme": "int8", "block_size": 16, "solver": "gptq"}
        rules = (QuantizeRule(("decoder.layers.*", "projector.*"), **fine), QuantizeRule(("*",), "float"))
        assert sqnr(golden_hidden(), run(tmp_path / "a", calibrated_recipe(*rules)).solved.hidden) > 30

    def test_it_beats_the_search(self, plain, tmp_path):
        searched = hidden_of(
            BlockStreamer(CONFIG, dense_view(run(tmp_path / "a", without_solvers()).weights))
        )
        assert sqnr(golden_hidden(), plain.solved.hidden) > sqnr(golden_hidden(), searched) + 1

    def test_aiming_at_the_float_model_helps(self, plain, tmp_path, monkeypatch):
        monkeypatch.setattr(layer_solver, "target_weight", lambda weight, moments: weight)
        straight = run(tmp_path / "straight", calibrated_recipe()).solved.hidden
        assert sqnr(golden_hidden(), plain.solved.hidden) > sqnr(golden_hidden(), straight) + 0.1

    def test_making_up_for_the_residual_stream_helps(self, tmp_path, monkeypatch):
        """On the mean of four dampings: with so few samples a single one may say anything."""
        dampings = (0.005, 0.01, 0.02, 0.03)

        def quality(kind: str) -> float:
            runs = (run(tmp_path / f"{kind}{d}", calibrated_recipe(damping=d)) for d in dampings)
            return float(np.mean([sqnr(golden_hidden(), found.solved.hidden) for found in runs]))

        whole = quality("whole")
        monkeypatch.setattr(block_solver, "stream_reader_of", lambda layer: None)
        assert whole > quality("blind") + 0.5

    def test_a_bias_keeps_the_mean(self, tmp_path):
        layer = "projector.fc2"
        found = run(tmp_path / "a", calibrated_recipe(), weights=floats(), only=lambda n: n == layer)
        fitted = golden_answers().num_fitted_pictures
        x = torch.cat(list(golden_answers().pictures[:fitted]))
        chain = BlockStreamer(CONFIG, {**floats(), **dense_view(found.solved.weights)})
        for block in chain.vision_blocks():
            x = chain.run(chain.load(block), x)
        reference = torch.from_numpy(golden_answers().features[:fitted])
        torch.testing.assert_close(x.mean((0, 1)), reference.mean((0, 1)), rtol=1e-4, atol=1e-5)
        shift = found.solved.weights[f"{layer}.bias"].array() - floats()[f"{layer}.bias"].array()
        assert np.abs(shift).max() > 1e-3

    def test_nothing_to_solve(self, tmp_path):
        found = run(tmp_path / "a", calibrated_recipe(), weights=floats(), only=lambda layer: False)
        assert found.files == {}
        assert close(found.solved.hidden, golden_hidden())
        assert close(found.solved.reference, golden_hidden())


def without_solvers():
    """The same schemes, found by search, and one layer for the solver so that there is something to do."""
    rules = [QuantizeRule(r.layers, r.scheme, r.block_size, r.symmetric, solver="search") for r in RULES]
    return calibrated_recipe(*rules)


class TestFineEncoder:
    """An encoder of 8 bits that needs no data, before layers that are solved with it."""

    SETTINGS = calibrated_recipe(DECODER, INT8)

    def test_layers_are_solved_behind_the_float_encoder(self, tmp_path):
        fine = run(tmp_path / "fine", self.SETTINGS, has_fine_encoder=True)
        encoder = {name: weight for name, weight in floats().items() if not is_language(name)}
        behind = run(tmp_path / "floats", self.SETTINGS, weights={**dense_view(fine.searched), **encoder})
        assert fine.files == behind.files
        assert fine.files != run(tmp_path / "own", self.SETTINGS).files

    def test_the_score_is_behind_its_own(self, tmp_path):
        fine = run(tmp_path / "fine", self.SETTINGS, has_fine_encoder=True)
        judged = golden_batch().answers[0] >= golden_answers().num_fitted
        assert close(fine.hidden()[judged], fine.solved.hidden[judged])
        assert not close(fine.hidden()[~judged], fine.solved.hidden[~judged])

    @pytest.mark.parametrize(
        ("rules", "is_fine"),
        [
            ((DECODER, INT8), True),
            ((DECODER, QuantizeRule(("*",), "float")), True),
            ((DECODER, QuantizeRule(("*",), "int4")), False),
            (RULES, False),
        ],
    )
    def test_which_are(self, rules, is_fine):
        assert has_fine_encoder(plans_of(calibrated_recipe(*rules))) is is_fine


class TestWhatALayerSees:
    @pytest.mark.parametrize("name", ["plain", "scaled"])
    @pytest.mark.parametrize(
        "layer",
        [
            "decoder.layers.1.mlp.down_proj",
            "decoder.layers.1.self_attn.o_proj",
            "vision.stages.4.blocks.0.ffn.fc1",
        ],
    )
    def test_inputs_come_from_the_stored_layers(self, request, tmp_path, name, layer):
        """A layer solved alone, behind a model that holds what was stored for all others."""
        settings, others = calibrated_recipe(awq=name == "scaled"), request.getfixturevalue(name)
        weights = dense_view(others.weights)
        own = {
            f"{layer}.{part}": floats()[f"{layer}.{part}"]
            for part in ("weight", "bias")
            if f"{layer}.{part}" in floats()
        }
        alone = run(tmp_path / "alone", settings, weights={**weights, **own}, only=lambda n: n == layer)
        expected, found = (
            r.weights[f"{layer}.weight"].read(0, own[f"{layer}.weight"].shape[0]) for r in (others, alone)
        )
        same = np.mean(expected.q == found.q)
        floated = run(tmp_path / "floated", settings, weights=floats(), only=lambda n: n == layer)
        other = np.mean(expected.q == floated.weights[f"{layer}.weight"].read(0, len(expected.q)).q)
        assert same > 0.99 > other

    def test_tokens_are_weighed(self, plain, tmp_path):
        even = run(tmp_path / "even", calibrated_recipe(), token_weights={})
        assert even.files["projector.fc1.safetensors"] == plain.files["projector.fc1.safetensors"]
        name = "decoder.layers.0.self_attn.o_proj.safetensors"
        assert even.files[name] != plain.files[name]

    def test_padding_does_not_count(self, plain, tmp_path):
        padded = ~golden_batch().real
        assert padded.any()
        loud = {name: torch.where(padded, 1e6, weights) for name, weights in golden_weights().items()}
        assert run(tmp_path / "loud", calibrated_recipe(), token_weights=loud).files == plain.files


class TestScales:
    def test_they_are_exact_in_float(self, scaled):
        """Norms with the scales taken out before floats that have them: the float model."""
        norms = {n: w for n, w in scaled.solved.weights.items() if "norm" in n}
        behind = behind_scales(floats(), {**floats(), **norms})
        changed = {n for n in behind if behind[n] is not floats()[n]}
        assert {n.rpartition(".")[0] for n in changed} >= {GATE, UP, "decoder.layers.1.self_attn.v_proj"}
        assert "vision.stages.3.blocks.0.attention.qkv.weight" in changed
        ratio = behind[f"{UP}.weight"].array() / floats()[f"{UP}.weight"].array()
        assert ratio.max() > 1.1
        assert close(golden_hidden(), hidden_of(BlockStreamer(CONFIG, {**behind, **norms})))
        assert not close(golden_hidden(), hidden_of(BlockStreamer(CONFIG, {**floats(), **norms})))

    def test_a_norm_that_others_read_keeps_its_own(self, tmp_path):
        rules = (
            QuantizeRule((UP,), "float"),
            QuantizeRule(("*.1.self_attn.k_proj",), "int4", 16, symmetric=False),
            DECODER,
            INT8,
        )
        found = run(tmp_path / "a", calibrated_recipe(*rules, awq=True))
        norms = {n for n in found.solved.weights if "norm" in n}
        assert norms == {
            "decoder.layers.0.input_layernorm.weight",
            "decoder.layers.1.post_attention_layernorm.weight",
        }
        assert close(found.hidden(), found.solved.hidden)

    def test_schemes_that_differ_share_no_scales(self, tmp_path):
        rules = (QuantizeRule((UP,), **{**INT4, "block_size": 32}), DECODER, INT8)
        found = run(tmp_path / "a", calibrated_recipe(*rules, awq=True), only=lambda n: n in (GATE, UP))
        assert not any("norm" in n for n in found.solved.weights)


class TestInterrupted:
    @pytest.mark.parametrize("name", ["plain", "scaled"])
    def test_missing_and_damaged_files_are_solved_again(self, request, tmp_path, name):
        whole, settings = request.getfixturevalue(name), calibrated_recipe(awq=name == "scaled")
        folder = tmp_path / "some"
        folder.mkdir()
        missing = (
            "decoder.layers.0.self_attn.k_proj",
            "decoder.layers.1.self_attn.q_proj",
            "decoder.layers.1.mlp.gate_proj",
            "vision.stages.3.blocks.0.attention.qkv",
        )
        damaged = {
            "projector.fc2.safetensors": b"",
            "decoder.layers.0.mlp.down_proj.safetensors": b"\x08\0\0",
        }
        for file, content in whole.files.items():
            if file.removesuffix(".safetensors") not in missing:
                (folder / file).write_bytes(damaged.get(file, content))
        before = tree_state(folder)
        again = run(folder, settings)
        assert again.files == whole.files
        kept = {file for file, state in tree_state(folder).items() if before.get(file) == state}
        assert kept == set(whole.files) - set(damaged) - {f"{layer}.safetensors" for layer in missing}
        assert close(again.solved.hidden, whole.solved.hidden)

    def test_it_goes_on_where_it_was(self, plain, tmp_path):
        def stop(share: float) -> None:
            if share >= 0.5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a", calibrated_recipe(), on_progress=stop)
        half = tree_state(tmp_path / "a")
        assert 5 < len(half) < len(plain.files)
        shares: list[float] = []
        again = run(tmp_path / "a", calibrated_recipe(), on_progress=shares.append)
        assert again.files == plain.files
        assert {f: s for f, s in tree_state(tmp_path / "a").items() if f in half} == half
        assert (shares == sorted(shares), shares[-1]) == (True, 1.0)

    def test_it_is_deterministic(self, scaled, tmp_path):
        assert run(tmp_path / "again", calibrated_recipe(awq=True)).files == scaled.files


def test_the_answers_are_not_padded_away():
    assert len(golden_hidden()) == sum(len(s.answer) for s in golden_answers().samples)
