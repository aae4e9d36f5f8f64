"""onnxruntime-genai's published wheel answers from a bundle as `run` does, token for token."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.manifest import changed_files, load_manifest
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.prompt import Message, Picture, Text
from fastvlm_convert.recipe import load_recipe, shipped_recipes, without_data
from tests.bundles import export_bundle, recipe
from tests.checkpoints import GOLDEN, HF, LLAVA, golden_cases
from tests.clients.genai import Genai, og, open_genai
from tests.commands import ROOT

DEMO = ROOT / "checkpoints" / "fastvlm-demo"
QUICK = "int4"
# Palettes are no ONNX, and ranges of activations need data.
ONNX = sorted(set(shipped_recipes()) - {"ios-ane", "int8-static", "int4-static"})
NEW_TOKENS = 60


@pytest.fixture(scope="module")
def pictures():
    square = load_image(DEMO / "check_images" / "00.png")
    return [square, square.transpose(0).resize((97, 130)), load_image(DEMO / "check_images" / "01.png")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Genai:
    return demo_bundle(QUICK, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def golden(fp32_bundle) -> Genai:
    return open_genai(fp32_bundle)


def demo_bundle(name: str, folder: Path) -> Genai:
    settings = without_data(load_recipe(name))
    return open_genai(export(DEMO, folder / name, recipe=settings, targets=["onnx"]).bundle)


def check_answers(genai: Genai, pictures) -> None:
    for question, images in (
        ("Describe the image.", pictures[:1]),
        ("How many shapes are there?", pictures[1:2]),
        ("What is in the middle?", pictures[2:]),
        ("What is different?", pictures[:2]),
        ("How many hearts are there?", []),
    ):
        prompt = genai.ours.prompt(question, images)
        assert genai.answer(prompt, NEW_TOKENS) == genai.our_answer(prompt, NEW_TOKENS), question


def test_a_recipe_with_integers_and_a_float16_cache(demo, pictures):
    """About one picture, square or not, about two, and about none; nothing is written beside the bundle."""
    check_answers(demo, pictures)
    assert changed_files(demo.folder, load_manifest(demo.folder)) == []
    found = {p.relative_to(demo.folder).as_posix() for p in demo.folder.rglob("*") if p.is_file()}
    assert found == {*load_manifest(demo.folder).files, "fastvlm_manifest.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ONNX) - {QUICK}))
def test_every_other_recipe(name, pictures, tmp_path):
    check_answers(demo_bundle(name, tmp_path), pictures)


@pytest.mark.parametrize("case", [case for case in golden_cases() if case.name == LLAVA], ids=str)
def test_the_original_codes_answers(golden, case):
    """The golden prompts, pixels and tokens are those of the original code."""
    image = [golden.contract.image_token_id] * golden.contract.num_image_tokens
    ids = np.array([case.ids_before_image + image + case.ids_after_image], np.int32)
    expected = case.greedy_token_ids
    generator = golden.generator(max_length=ids.shape[1] + len(expected))
    generator.set_inputs(golden.inputs(ids, (case.array("pixel_values"),)))
    assert golden.rest(generator) == expected


def test_float16_of_a_golden(fp16_bundle, pictures):
    check_answers(open_genai(fp16_bundle), pictures)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_golden_in_transformers_layout(name, tmp_path, pictures):
    genai = open_genai(export_bundle(GOLDEN / HF / "checkpoint", tmp_path / "bundle", recipe(name)))
    check_answers(genai, pictures)


def test_inputs_one_by_one(demo, pictures):
    """The calls that Java has."""
    prompt = demo.ours.prompt("Describe the image.", pictures[:1])
    ids = demo.ids(prompt)
    tokens = np.array([demo.contract.num_image_tokens])
    generator = demo.generator(max_length=len(ids) + NEW_TOKENS)
    generator.set_model_input("pixel_values", prompt.images[0])
    generator.set_model_input("num_image_tokens", tokens)
    generator.append_tokens(ids[None])
    assert demo.rest(generator) == demo.our_answer(prompt, NEW_TOKENS)


def test_a_batch_of_prompts_of_one_length(demo, pictures):
    prompts = [demo.ours.prompt("Describe the image.", [picture]) for picture in pictures]
    ids = np.stack([demo.ids(prompt) for prompt in prompts])
    generator = demo.generator(len(prompts), max_length=ids.shape[1] + NEW_TOKENS)
    generator.set_inputs(demo.inputs(ids, tuple(prompt.images[0] for prompt in prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    while not generator.is_done():
        generator.generate_next_token()
        for tokens, token in zip(answers, generator.get_next_tokens(), strict=True):
            tokens.append(int(token))
    for tokens, prompt in zip(answers, prompts, strict=True):
        expected = demo.our_answer(prompt, NEW_TOKENS)
        assert tokens[: len(expected)] == expected
        assert set(tokens[len(expected) :]) <= {*demo.contract.eos_token_ids}


def test_several_turns(demo, pictures):
    """The generator keeps the conversation but for the token that ended the answer."""
    first = Message("user", (Picture(pictures[0]), "Describe the image."))
    prompt = demo.ours.conversation([first])
    ids = demo.ids(prompt)
    generator = demo.generator(max_length=len(ids) + 200)
    generator.set_inputs(demo.inputs(ids[None], prompt.images))
    said = demo.rest(generator)
    question = "How many shapes are there?"
    turn = f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    generator.append_tokens(demo.tokenizer.encode(turn)[None])
    reply = Message("assistant", (demo.ours.tokenizer.decode(said),))
    whole = demo.ours.conversation([first, reply, Message("user", (question,))])
    expected = demo.our_answer(whole, NEW_TOKENS)
    assert demo.rest(generator)[:NEW_TOKENS] == expected


def test_an_answer_ends_at_every_end_token(golden):
    """A token that the golden answers with, made the last of the end tokens, ends the answer."""
    prompt = golden.ours.prompt("What is this?", [])
    tokens = golden.answer(prompt, 6)
    assert len(tokens) == 6
    ends = json.loads((golden.folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    assert ends == list(golden.contract.eos_token_ids) == [431, 429]
    config = og.Config(str(golden.folder))
    config.overlay(json.dumps({"model": {"eos_token_id": [*ends, tokens[3]]}}))
    ended = replace(golden, model=og.Model(config)).answer(prompt, 6)
    assert ended == tokens[: tokens.index(tokens[3]) + 1]


def test_the_whole_context(golden):
    """Without options there is room for it, and the last tokens that fit are those of `run`."""
    length = golden.contract.context_length
    ids = np.arange(length - 8) % 400
    generator = golden.generator(min_length=length)
    generator.append_tokens(ids.astype(np.int32)[None])
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert len(found) == 8
    session = golden.ours.session
    logits = session.prefill(session.embed(ids)).copy()
    for token in found:
        logits[list(golden.contract.eos_token_ids)] = -np.inf
        assert token == int(logits.argmax())
        if token is not found[-1]:
            logits = session.decode(session.embed(np.array([token]))).copy()


def test_more_than_the_context_is_refused(golden):
    length = golden.contract.context_length
    with pytest.raises(RuntimeError, match="cannot be greater than model context_length"):
        golden.generator(max_length=length + 1)
    with pytest.raises(RuntimeError, match="exceeds max length"):
        golden.generator().append_tokens(np.zeros((1, length + 1), np.int32))


@pytest.mark.parametrize("given", [-1, 1])
def test_another_number_of_image_tokens_is_refused(golden, given, capfd):
    count = golden.contract.num_image_tokens + given
    ids = np.array([[1, *[golden.contract.image_token_id] * count, 2]], np.int32)
    size = golden.contract.image_size
    generator = golden.generator(max_length=100)
    with pytest.raises(RuntimeError, match="ScatterND"):
        generator.set_inputs(golden.inputs(ids, (np.zeros((1, 3, size, size), np.float32),)))
    capfd.readouterr()  # ONNX Runtime prints the error, too


def test_the_image_token_without_a_picture_is_a_token(golden):
    ids = np.array([5, golden.contract.image_token_id, 7])
    generator = golden.generator(max_length=4)
    generator.append_tokens(ids.astype(np.int32)[None])
    session = golden.ours.session
    assert golden.rest(generator) == [int(session.prefill(session.embed(ids)).argmax())]


TEXTS = (
    "Describe the image.",
    "",
    "  two  spaces \t tab\n\nlines\r\n end ",
    "\u00fcn\u00efc\u00f6d\u00e9 \u6f22\u5b57 \U0001f600\u200d\U0001f468 \ufeff \u202e",
    "1234567890 1,000.5e-3",
    "it's DON'T we'Ll",
    "a" * 300,
    "<|im_end|>\n<|im_start|>user <image> <image <|nothing|>",
    unicodedata.normalize("NFC", "e\u0301 \u1112\u1161\u11ab \u212b"),
)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_its_tokenizer_gives_the_ids_of_ours(golden, text):
    """Of text in Unicode's composed form, in which special tokens are tokens."""
    ours = golden.ours.tokenizer.encode_texts([Text(text, is_format=True)])
    assert golden.tokenizer.encode(text).tolist() == ours
    prompt = golden.contract.prompt.replace("{question}", text)
    ids = golden.ours.tokenizer.encode_texts([Text(prompt, is_format=True)])
    assert golden.tokenizer.encode(prompt).tolist() == ids


def test_its_tokenizer_does_not_compose_text(golden):
    """It ignores the normalizer that Python's `tokenizers` applies, so docs/onnx.md composes text itself."""
    apart = "e\u0301"
    assert golden.ours.tokenizer.encode(apart) == golden.ours.tokenizer.encode("\u00e9")
    assert golden.tokenizer.encode(apart).tolist() != golden.tokenizer.encode("\u00e9").tolist()


QUESTION = "How many?"
CONVERSATIONS = {
    "one turn": [("user", (None, QUESTION))],
    "no picture": [("user", (QUESTION,))],
    "several turns": [("user", (None, "What?")), ("assistant", ("A heart.",)), ("user", (QUESTION,))],
    "system": [("system", ("Be brief.",)), ("user", (None, QUESTION))],
    "two pictures": [("user", (None, "and", None, QUESTION))],
    "unicode": [("user", (None, TEXTS[3]))],
}


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_its_chat_template_writes_our_prompts(golden, pictures, turns):
    def part(content: str | None):
        return {"type": "image"} if content is None else {"type": "text", "text": content}

    messages = [{"role": role, "content": [part(c) for c in content]} for role, content in turns]
    text = golden.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    conversation = [
        Message(role, tuple(Picture(pictures[0]) if c is None else c for c in content))
        for role, content in turns
    ]
    image = golden.contract.image_token
    ids = golden.tokenizer.encode(text.replace(image, image * golden.contract.num_image_tokens))
    assert ids.tolist() == golden.ids(golden.ours.conversation(conversation)).tolist()


def test_its_own_processors_are_not_for_fastvlm(golden):
    with pytest.raises(RuntimeError, match="key 'processor' not found"):
        golden.model.create_multimodal_processor()


def test_the_wheel_is_the_version_that_the_page_names():
    assert f"onnxruntime-genai {og.__version__}" in (ROOT / "docs" / "onnx.md").read_text()
