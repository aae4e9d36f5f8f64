import sys

import numpy as np
import pytest

from fastvlm_convert.errors import (
    BundleError,
    ImageError,
    MissingDependencyError,
    PromptError,
    TokenizerError,
)
from fastvlm_convert.generate import generate
from fastvlm_convert.pictures import load_image
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.runtime.loaded import load_bundle, load_reference
from tests.bundles import copy_bundle, open_bundle
from tests.checkpoints import GOLDEN, LLAVA, golden_cases, golden_checkpoint


def test_a_bundle_is_loaded_with_all_that_its_manifest_says(fp32_bundle):
    loaded = open_bundle(fp32_bundle)
    assert loaded.eos_token_ids == (431, 429)
    assert (loaded.images.size, loaded.images.mode) == (256, "pad")
    assert loaded.tokenizer.image_token_id == 432


def test_bundle_and_reference_make_the_same_prompt(fp32_bundle):
    image = load_image(GOLDEN / LLAVA / "image1.png")
    models = (open_bundle(fp32_bundle), load_reference(golden_checkpoint(LLAVA)))
    ours, theirs = (m.prompt("Describe <image>!", [image]) for m in models)
    for a, b in zip([*ours.segments, *ours.images], [*theirs.segments, *theirs.images], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_reference_takes_another_image_size_and_mode():
    images = ImageSettings(320, "crop")
    loaded = load_reference(golden_checkpoint(LLAVA), images, context_length=77)
    assert loaded.images == images
    assert (loaded.session.num_image_tokens, loaded.session.context_length) == (25, 77)
    assert golden_checkpoint(LLAVA).config.vision.image_size == 256  # untouched


def test_a_target_that_is_not_there(fp32_bundle):
    with pytest.raises(BundleError, match="the bundle has no target 'coreml'") as caught:
        load_bundle(fp32_bundle, "coreml")
    assert caught.value.hint == "it has onnx"


def test_a_runtime_that_is_not_installed(fp32_bundle, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastvlm_convert.runtime.onnx_session", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="running ONNX bundles needs onnxruntime") as caught:
        load_bundle(fp32_bundle, "onnx")
    assert "pip install '.[onnx]'" in caught.value.hint


def test_a_bundle_without_tokenizer(fp32_bundle, tmp_path):
    bundle = copy_bundle(fp32_bundle, tmp_path)
    file = bundle / "tokenizer.json"
    file.write_text("{}".ljust(file.stat().st_size))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_bundle(bundle, "onnx")


def test_another_sequence_is_of_the_same_weights_where_the_runtime_can(fp32_bundle):
    loaded = open_bundle(fp32_bundle)
    another = loaded.another()
    assert another.session is not loaded.session
    assert another.session.weights is loaded.session.weights
    assert another.cache is loaded.cache
    assert load_reference(golden_checkpoint(LLAVA)).another() is None


@pytest.fixture(scope="module")
def loaded(fp32_bundle):
    return open_bundle(fp32_bundle)


class TestAsk:
    def test_a_second_question_encodes_nothing_again(self, fp32_bundle):
        loaded = open_bundle(fp32_bundle)
        image = GOLDEN / LLAVA / "image1.png"
        answers = [loaded.ask(image, text, max_new_tokens=4).finish() for text in ("Who?", "Where?", "Who?")]
        assert [answer.encoded_images for answer in answers] == [1, 0, 0]
        assert answers[0].cached_tokens == 0
        assert answers[1].cached_tokens == answers[2].cached_tokens >= 16
        assert answers[2].token_ids == answers[0].token_ids
        assert answers[1].timings.vision_s < answers[0].timings.vision_s

    @pytest.mark.parametrize("case", [c for c in golden_cases() if c.name == LLAVA], ids=str)
    def test_the_pieces_are_the_golden_answer(self, loaded, case):
        pieces = list(loaded.ask(case.image, case.question, max_new_tokens=24))
        assert "".join(pieces) == case.greedy_text
        assert len(pieces) > 10

    def test_images_may_be_files_or_pictures(self, loaded):
        file = GOLDEN / LLAVA / "image1.png"
        said = [
            loaded.ask(images, "Hi", max_new_tokens=8).finish().token_ids
            for images in (file, str(file), [file], load_image(file), (load_image(file).convert("RGBA"),))
        ]
        assert len(set(said)) == 1

    @pytest.mark.parametrize("images", [None, (), []])
    def test_no_image(self, loaded, images):
        prompt = loaded.prompt("Hi", [])
        expected = generate(loaded.session, prompt, loaded.eos_token_ids, 8)
        assert loaded.ask(images, "Hi", max_new_tokens=8).finish().token_ids == expected.token_ids

    def test_several_images(self, loaded):
        files = [GOLDEN / LLAVA / f"image{n}.png" for n in (0, 1)]
        prompt = loaded.prompt("Which is larger?", [load_image(file) for file in files])
        assert len(prompt.images) == 2
        expected = generate(loaded.session, prompt, loaded.eos_token_ids, 8)
        said = loaded.ask(files, "Which is larger?", max_new_tokens=8).finish()
        assert said.token_ids == expected.token_ids

    def test_sampling_is_repeatable(self, loaded):
        said = [
            loaded.ask(None, "Hi", max_new_tokens=12, temperature=2.0, seed=seed).finish().token_ids
            for seed in (1, 1, 2)
        ]
        assert said[0] == said[1] != said[2]

    def test_what_does_not_fit_is_refused_at_once(self, loaded):
        with pytest.raises(PromptError, match="exceed the context"):
            loaded.ask(None, "Hi", max_new_tokens=1 << 20)
        with pytest.raises(ImageError, match="there is no such image"):
            loaded.ask("nowhere.png", "Hi")
