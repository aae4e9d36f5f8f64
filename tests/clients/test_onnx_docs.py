"""docs/onnx.md: its Python runs as it stands, and answers as `run` does."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe, without_data
from fastvlm_convert.runtime.loaded import load_bundle
from tests.commands import ROOT

DEMO = ROOT / "checkpoints" / "fastvlm-demo"
PAGE = ROOT / "docs" / "onnx.md"
PLAIN, GENAI = re.findall(
    r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
QUESTIONS = ("Describe the image.", "How many shapes are there?")


@pytest.fixture(
    scope="module",
    params=["fp16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("android-int4", "web-small"))],
)
def made(request, tmp_path_factory) -> Path:
    """A folder as the page has it: a bundle, whose cache is float16 or float32, and a picture."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = without_data(load_recipe(request.param))
    export(DEMO, folder / "bundle", recipe=settings, targets=["onnx"])
    image = load_image(DEMO / "check_images" / "00.png")
    image.crop((0, 20, image.width, image.height)).save(folder / "photo.jpg")
    return folder


@pytest.fixture
def folder(made, monkeypatch) -> Path:
    """That folder, as the current one."""
    monkeypatch.chdir(made)
    return made


@cache
def expected(folder: Path) -> list[str]:
    """What `run` answers."""
    loaded = load_bundle(folder / "bundle", "onnx")
    return ["".join(loaded.ask(folder / "photo.jpg", question)) for question in QUESTIONS]


def test_plain_onnx_runtime(folder, capsys):
    names: dict = {}
    exec(compile(PLAIN, PAGE, "exec"), names)
    answers = expected(folder)
    assert capsys.readouterr().out == f"{answers[0]}\n"
    assert [names["answer"]("photo.jpg", question) for question in QUESTIONS] == answers
    assert answers[0].startswith(names["answer"]("photo.jpg", QUESTIONS[0], 3))


def test_the_loop_of_public_model_cards(folder):
    """Names and shapes from config.json alone, `<image>` in the ids, features put over their rows."""
    bundle = folder / "bundle"
    config = json.loads((bundle / "config.json").read_text())
    dtypes = config["transformers.js_config"]["dtype"]
    suffix = {"fp16": "_fp16", "q4": "_q4", "q4f16": "_q4f16"}
    vision, embed, decoder = (
        onnxruntime.InferenceSession(bundle / "onnx" / f"{name}{suffix[dtypes[name]]}.onnx")
        for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    )
    kept = config["transformers.js_config"]["kv_cache_dtype"]
    kv = np.dtype(kept.get(dtypes["decoder_model_merged"], "float32"))
    width = config["hidden_size"] // config["num_attention_heads"]
    cache = {
        f"past_key_values.{layer}.{part}": np.zeros((1, config["num_key_value_heads"], 0, width), kv)
        for layer in range(config["num_hidden_layers"])
        for part in ("key", "value")
    }
    loaded = load_bundle(bundle, "onnx")
    prompt = loaded.prompt(QUESTIONS[0], [load_image(folder / "photo.jpg")])
    features = vision.run(["image_features"], {"pixel_values": prompt.images[0]})[0]
    image = np.full(len(features), config["image_token_index"])
    ids = np.concatenate([prompt.segments[0], image, prompt.segments[1]])[None]
    mask, tokens = np.ones_like(ids), []
    while not tokens or tokens[-1] not in config["eos_token_id"]:
        x = embed.run(None, {"input_ids": ids})[0]
        if not tokens:
            x[ids == config["image_token_index"]] = features.reshape(-1, features.shape[-1])
        logits, *present = decoder.run(None, {"inputs_embeds": x, "attention_mask": mask, **cache})
        ids = logits[:, -1].argmax(-1, keepdims=True)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=-1)
        cache = {name: present[j] for j, name in enumerate(cache)}
        tokens.append(int(ids[0, 0]))
    assert loaded.tokenizer.decode(tokens[:-1]) == expected(folder)[0]


def test_onnx_runtime_genai(folder, capsys):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    names: dict = {}
    exec(compile(PLAIN, PAGE, "exec"), names)
    capsys.readouterr()
    exec(compile(GENAI, PAGE, "exec"), names)
    answers = expected(folder)
    assert capsys.readouterr().out == answers[0]
    assert ["".join(names["stream"]("photo.jpg", question)) for question in QUESTIONS] == answers
