"""mlx-vlm, unmodified, from the environment of `make clients-mlx`: what it answers from our folder."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.generate import generate
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe, without_data
from fastvlm_convert.runtime.loaded import LoadedModel, load_engine
from tests.checkpoints import GOLDEN, HF, LLAVA, SHARDED, golden_cases

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "checkpoints" / "fastvlm-demo"
# Of another place than the Makefile's, for whoever has one.
GIVEN = os.environ.get("MLX_VLM_PYTHON")
PYTHON = Path(GIVEN or ROOT / ".venv-mlx" / "bin" / "python")
IS_THERE = PYTHON.exists() and (GIVEN or (ROOT / ".venv-mlx" / ".ready").exists())  # not half of it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_THERE, reason="mlx-vlm is not installed: make clients-mlx"),
]


def ask(bundle: Path, checkpoint: Path, questions: list[dict], folder: Path) -> dict:
    """What mlx-vlm's own processor, chat template and decode loop make of some questions."""
    stages = open_checkpoint(checkpoint).config.vision.stages
    job = {
        "folder": str(bundle / "mlx"),
        "layers": [stage.depth for stage in stages],
        "widths": [stage.width for stage in stages],
        "questions": questions,
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [PYTHON, Path(__file__).parent / "mlx_vlm_client.py", folder / "job.json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("golden", [LLAVA, HF, SHARDED])
def test_it_says_what_the_original_code_says(golden, name, tmp_path):
    """24 of 24 greedy tokens of every golden case, with mlx-vlm's own pixels and prompt."""
    checkpoint = GOLDEN / golden / "checkpoint"
    export(checkpoint, tmp_path / "bundle", recipe=name, targets="mlx")
    cases = [case for case in golden_cases() if case.name == golden]
    asked = [
        {"image": str(case.image), "question": case.question, "max_tokens": 24, "text": False}
        for case in cases
    ]
    answers = ask(tmp_path / "bundle", checkpoint, asked, tmp_path)["answers"]
    assert [answer["token_ids"] for answer in answers] == [case.greedy_token_ids for case in cases]


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_the_demos_answers_are_those_of_the_same_integers(name, tmp_path):
    """As text, too, through the function that docs/mlx.md shows."""
    settings = without_data(load_recipe(name))
    export(DEMO, tmp_path / "bundle", recipe=settings, targets="mlx")
    model = load_engine(open_checkpoint(DEMO), settings, 2048)
    pictures = sorted((DEMO / "check_images").glob("*.png"))[:6]
    question = "Describe the image."
    expected = [answer(model, picture, question) for picture in pictures]
    asked = [{"image": str(p), "question": question, "max_tokens": 64, "text": True} for p in pictures]
    found = ask(tmp_path / "bundle", DEMO, asked, tmp_path)
    assert [given["text"].strip() for given in found["answers"]] == [text for _, text in expected]
    for given, (ids, _) in zip(found["answers"], expected, strict=True):
        length = min(len(ids), len(given["token_ids"]))
        assert length >= len(ids) - 1  # mlx-vlm may leave the end token out
        assert given["token_ids"][:length] == ids[:length]
    is_quantized = any("uint32" in dtype for dtype in found["parameters"].values())
    assert is_quantized is bool(settings.quantize)


def answer(model: LoadedModel, picture: Path, question: str) -> tuple[list[int], str]:
    prompt = model.prompt(question, [load_image(picture)])
    result = generate(model.session, prompt, model.eos_token_ids, 64)
    return list(result.token_ids), model.tokenizer.decode(result.token_ids).strip()


def test_the_id_of_the_tokenizer_would_lose_the_picture(tmp_path):
    """Why the folder has a config.json of its own: mlx-vlm then says nothing and sees nothing."""
    export(DEMO, tmp_path / "bundle", recipe="fp16", targets="mlx")
    pictures = sorted((DEMO / "check_images").glob("*.png"))[:2]
    asked = [
        {"image": str(picture), "question": "Describe the image.", "max_tokens": 32, "text": False}
        for picture in pictures
    ]
    config = tmp_path / "bundle" / "mlx" / "config.json"
    seen = ask(tmp_path / "bundle", DEMO, asked, tmp_path)["answers"]
    config.write_text(json.dumps({**json.loads(config.read_text()), "image_token_index": 335}))
    blind = ask(tmp_path / "bundle", DEMO, asked, tmp_path)["answers"]
    assert seen[0]["token_ids"] != seen[1]["token_ids"]
    assert blind[0]["token_ids"] != seen[0]["token_ids"]
