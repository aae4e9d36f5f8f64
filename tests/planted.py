"""Copies of the demo checkpoint with the traps that Qwen2 sets for float16.

The demo answers its check pictures as before with each of them, in float32.
"""

import shutil
from pathlib import Path

import numpy as np
import torch

from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint
from fastvlm_convert.float16.report import RangeReport
from fastvlm_convert.float16.scan import scan
from fastvlm_convert.generate import generate, teacher_forced
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.questions import Question, read_questions
from fastvlm_convert.runtime.loaded import LoadedModel, load_folded_reference
from tests.checkpoints import read_tensors, write_tensors

DEMO = Path(__file__).parent.parent / "checkpoints" / "fastvlm-demo"
LAYERS, HEADS, GROUP, HEAD_DIM = 4, 4, 2, 32
QUESTIONS = [0, 8]  # of the demo's check pictures

Tensors = dict[str, torch.Tensor]

_ONCE = 331  # a token that stands once in every prompt, in the system's part
_CHANNEL = 175
_PAIR = 15  # the slowest rotary pair: its bias is nearly the same at all positions


def copy_demo(folder: Path, tensors: Tensors) -> Path:
    """A copy of the demo with other tensors."""
    copy = Path(shutil.copytree(DEMO, folder / "planted"))
    write_tensors(copy, tensors)
    return copy


def plant_residual(tensors: Tensors) -> Tensors:
    """Sums of 120,000: one token, as real models do, has a huge value in a channel that no other one uses."""
    channel = _CHANNEL
    tensors["model.embed_tokens.weight"][:, channel] = 0
    tensors["model.embed_tokens.weight"][_ONCE, channel] = 200
    tensors["model.mm_projector.2.weight"][channel] = 0
    tensors["model.mm_projector.2.bias"][channel] = 0
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"{layer}.{module}.weight"][channel] = 0
        for module in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            tensors[f"{layer}.{module}.weight"][:, channel] = 0
    # One neuron of the first layer sees that channel alone: it is 16 after the norm, so the neuron gives 256.
    tensors["model.layers.0.post_attention_layernorm.weight"][channel] = 1
    for module in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{module}.weight"][0] = 0
        tensors[f"model.layers.0.mlp.{module}.weight"][0, channel] = 1
    tensors["model.layers.0.mlp.down_proj.weight"][:, 0] = 0
    tensors["model.layers.0.mlp.down_proj.weight"][channel, 0] = 470
    return tensors


def plant_key_bias(tensors: Tensors, key: float = 1000, query: float = 70) -> Tensors:
    """Biases of one pair of every head of the last three layers; with the defaults, scores above 70,000.

    What the pair says is made smaller as its partner grows, so that it keeps its weight in the scores.
    """
    for i in range(1, LAYERS):
        attention = f"model.layers.{i}.self_attn"
        for name in ("q_proj.bias", "k_proj.bias", "q_proj.weight", "k_proj.weight"):
            tensors[f"{attention}.{name}"] = tensors[f"{attention}.{name}"].float()
        for head in range(HEADS):
            rows = torch.tensor([_PAIR, _PAIR + HEAD_DIM // 2])
            tensors[f"{attention}.k_proj.bias"][head * HEAD_DIM + _PAIR] = key
            tensors[f"{attention}.k_proj.weight"][head * HEAD_DIM + rows] /= max(1, query / 4)
            for h in range(head * GROUP, (head + 1) * GROUP):
                tensors[f"{attention}.q_proj.bias"][h * HEAD_DIM + _PAIR] = query
                if query < 1:
                    tensors[f"{attention}.q_proj.weight"][h * HEAD_DIM + rows] *= query
    return tensors


def demo_tensors() -> Tensors:
    """The demo's own."""
    return read_tensors(DEMO)


def questions() -> list[Question]:
    """Two of the demo's check pictures."""
    every = read_questions(DEMO / "check_images")
    return [every[i] for i in QUESTIONS]


def scanned(folder: Path) -> RangeReport:
    """What a short scan of a checkpoint finds."""
    checkpoint = open_checkpoint(folder)
    loaded, model = load_folded_reference(checkpoint)
    return scan(model, loaded, questions(), content_hash(checkpoint.files), 4)


def answers(model: LoadedModel) -> list[list[int]]:
    """Token ids that a model answers the questions with."""
    return [
        generate(model.session, model.conversation(q.messages), model.eos_token_ids, 16).token_ids
        for q in questions()
    ]


def forced_logits(model: LoadedModel, reference: LoadedModel) -> list[np.ndarray]:
    """A decoder's logits while the reference's answers are given to it, float32 [answer, vocab] each."""
    found = []
    for question, answer in zip(questions(), answers(reference), strict=True):
        prompt = reference.conversation(question.messages)
        features = [reference.session.encode_image(prompt.images[0])]
        embeds = embed_prompt(reference.session, prompt, features)
        found.append(teacher_forced(model.session, embeds, answer))
    return found
