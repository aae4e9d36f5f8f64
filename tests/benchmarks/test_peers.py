"""What the comparison with other engines computes of figures and reads in files."""

import importlib.util

import numpy as np
import onnx
import pytest

from benchmarks.contenders import Contender, Workshop, contenders, made
from benchmarks.paired import markdown, paired_ratio, spread, turns
from benchmarks.peer_made import made_gguf, made_onnx
from benchmarks.peer_quality import QUESTIONS, openness, prompts_of
from benchmarks.peers import made_table, ratio_table
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.intervals import MINIMUM
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe, without_data
from tests.planted import DEMO


def test_a_ratio_of_pairs_is_blind_to_what_slows_a_whole_round():
    slowed = np.array([1.0, 0.2, 0.7, 0.1, 0.9])
    found = paired_ratio(60 * slowed, 50 * slowed)
    assert found.low == pytest.approx(1.2)
    assert found.high == pytest.approx(1.2)
    assert spread(60 * slowed).high > 3 * spread(60 * slowed).low


def test_figures_of_other_rounds_are_no_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        paired_ratio(np.ones(3), np.ones(4))


def test_everybody_has_every_turn():
    names = ["a", "b", "c"]
    orders = [turns(names, n) for n in range(3)]
    assert all(sorted(order) == names for order in orders)
    assert {tuple(order[place] for order in orders) for place in range(3)} == {
        ("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b"),
    }  # fmt: skip


def test_the_table_of_ratios_has_ours_above_theirs():
    figures = {name: {"decode": np.full(4, speed)} for name, speed in (("int4", 60.0), ("peer", 48.0))}
    assert "| int4 | 1.25 [1.25, 1.25] |" in ratio_table(figures, ["int4"], ["peer"], "decode")


def test_a_table_is_one_that_pages_can_show():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def matrix(block_size: int, *, zero_points: bool) -> onnx.NodeProto:
    inputs = ["x", "q", "s", *(["z"] if zero_points else [])]
    return onnx.helper.make_node(
        "MatMulNBits", inputs, ["y"], bits=4, block_size=block_size, accuracy_level=4, domain="com.microsoft"
    )


def test_what_a_graph_holds_is_read_off_its_nodes(tmp_path):
    nodes = [matrix(32, zero_points=False)] * 2 + [matrix(128, zero_points=True)]
    graph = onnx.helper.make_graph(nodes, "g", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    assert made_onnx([tmp_path / "model.onnx"]).schemes == {
        "int4 block 32 symmetric, int8 activations": 2,
        "int4 block 128 asymmetric, int8 activations": 1,
    }


def test_what_a_bundle_holds_is_what_its_recipe_says(tmp_path):
    export(DEMO, tmp_path / "bundle", targets="onnx", recipe=without_data(load_recipe("android-int4")))
    found = made(contenders(["android-int4"])[0], tmp_path / "bundle")
    assert found.schemes == {
        "int4 block 32 symmetric, int8 activations": 20,
        "int8 block 128 symmetric, int8 activations": 1,
    }
    files = {path for path in (tmp_path / "bundle").rglob("*") if "vision" not in path.name}
    assert 0 < found.num_bytes < sum(path.stat().st_size for path in files)


def test_a_peer_that_is_missing_is_not_run_and_says_how_to_install_it():
    absent = Contender("peer", "llama", "Q4_0", ("no_such_module", "json"))
    assert absent.not_run is not None
    assert "no_such_module missing" in absent.not_run
    assert "fastvlm-convert[peers]" in absent.not_run
    assert "not_run: no_such_module" in made_table({}, {absent: absent.not_run})
    assert Contender("ours", "bundle", "recipe", ("json",)).not_run is None


def test_an_engine_that_is_unknown_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match=r"there are: int4, .*genai b32"):
        contenders(["vllm"])


def test_random_weights_are_told_from_trained_ones():
    rng = np.random.default_rng(0)
    assert openness(0.6 * rng.standard_normal((4, 20_000))) > 0.95
    assert openness(10 * rng.standard_normal((4, 20_000))) < 0.5
    assert openness(np.zeros((2, 100))) == pytest.approx(1)


def test_questions_are_prompts_of_the_model_and_enough_for_an_interval():
    checkpoint = open_checkpoint(DEMO)
    prompts = prompts_of(checkpoint)
    assert len(prompts) == len(set(QUESTIONS)) >= MINIMUM
    assert QUESTIONS[0] in checkpoint.tokenizer.decode(prompts[0])


def test_gguf_has_every_weight_of_the_decoder_under_its_own_name(tmp_path):
    gguf = pytest.importorskip("gguf")
    from benchmarks.gguf_checkpoint import gguf_weights, write_gguf

    checkpoint = open_checkpoint(DEMO)
    names = gguf_weights(checkpoint)
    assert len(names) == sum(name.startswith("decoder.") for name in checkpoint.weights)
    bias = checkpoint.weights["decoder.layers.1.self_attn.k_proj.bias"].array()
    path = write_gguf(checkpoint, tmp_path / "decoder.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(tensors["blk.1.attn_k.bias"].data, bias)
    table = checkpoint.weights["decoder.embed_tokens.weight"].array()
    np.testing.assert_array_equal(tensors["token_embd.weight"].data, table.astype(np.float16))
    assert set(made_gguf(path).schemes) == {"F16"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["genai b32", "genai b128", "llama.cpp Q4_0", "llama.cpp Q4_K_M", "torch"])
def test_a_peer_computes_the_same_model(tmp_path, name):
    """Its own file of the demo's weights says what the reference says, as far as its scheme lets it."""
    from benchmarks.peer_quality import examine, hold_exam
    from benchmarks.peers import Process

    [peer] = contenders([name])
    if peer.not_run is not None:
        pytest.skip(peer.not_run)
    path, _ = Workshop(DEMO, tmp_path).make(peer)
    with Process("reference", DEMO, 1) as reference:
        exam = hold_exam(reference, open_checkpoint(DEMO), tmp_path)
    with Process(peer.kind, path, 1) as engine:
        found = examine(engine, exam)
        timed = engine.ask(do="time", prompt=exam.prompts[0], steps=4)
    assert found.kl < (1e-8 if name == "torch" else 0.5)
    assert timed["decode_s"] > 0
    if name == "genai b128":
        assert made(peer, path).schemes.keys() == {"int4 block 128 symmetric, int8 activations"}


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="it is installed")
def test_a_fresh_set_up_has_no_compiled_peer():
    assert contenders(["llama.cpp Q4_0"])[0].not_run is not None
