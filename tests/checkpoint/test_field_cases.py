"""Files from the field, with what transformers 5.24 answers on them: its first ten greedy tokens."""

import json
import shutil
from pathlib import Path

import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.generate import generate
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.prompt import user_message
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle, load_reference
from tests.bundles import FP32, recipe
from tests.checkpoints import GOLDEN, HF

CASES = Path(__file__).parent.parent / "data" / "cases"
NAMES = ("hf-processor-nested-512", "hf-own-chat-template")


@pytest.fixture(params=NAMES)
def case(request, tmp_path) -> Path:
    """A whole checkpoint: the case's files and the golden weights."""
    folder = tmp_path / request.param
    shutil.copytree(CASES / request.param, folder)
    shutil.copy(GOLDEN / HF / "checkpoint" / "model.safetensors", folder)
    return folder


def tokens(model: LoadedModel) -> list[int]:
    image = load_image(GOLDEN / HF / "image2.png")
    prompt = model.conversation([user_message("How many circles are there?", [image])])
    return list(generate(model.session, prompt, (), 10).token_ids)


def test_the_reference_answers_as_transformers(case):
    expected = json.loads((case / "expected_tokens.json").read_text())
    assert tokens(load_reference(open_checkpoint(case))) == expected


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_a_bundle_answers_as_transformers(case, target, tmp_path):
    expected = json.loads((case / "expected_tokens.json").read_text())
    export(case, tmp_path / "bundle", recipe=recipe(FP32), targets=target)
    assert tokens(load_bundle(tmp_path / "bundle", target)) == expected
