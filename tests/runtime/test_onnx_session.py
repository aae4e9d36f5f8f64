import numpy as np
import onnxruntime
import pytest
from PIL import Image

from fastvlm_convert import metrics
from fastvlm_convert.errors import BundleError, PromptError
from fastvlm_convert.generate import embed_prompt, generate
from fastvlm_convert.pictures import load_image
from fastvlm_convert.runtime.loaded import load_reference
from tests.bundles import copy_bundle, export_bundle, open_bundle, recipe
from tests.checkpoints import GOLDEN, LLAVA, golden_checkpoint

IMAGES = [load_image(GOLDEN / LLAVA / f"image{i}.png") for i in range(2)]


@pytest.fixture(scope="module")
def reference():
    return load_reference(golden_checkpoint(LLAVA))


@pytest.fixture(scope="module")
def candidate(fp32_bundle):
    return open_bundle(fp32_bundle)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A bundle with a context of 64 tokens."""
    folder = tmp_path_factory.mktemp("short")
    settings = recipe(common={"max_context_length": 64})
    return open_bundle(export_bundle(GOLDEN / LLAVA / "checkpoint", folder / "bundle", settings))


def embeds_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).normal(size=(length, 64)).astype(np.float32)


def test_it_says_what_it_is(candidate):
    session = candidate.session
    assert session.executed_by == f"onnxruntime {onnxruntime.__version__}"
    assert (session.context_length, session.num_image_tokens) == (2048, 16)


def test_every_step_is_the_references(candidate, reference):
    pixels = reference.prompt("?", IMAGES[:1]).images[0]
    assert metrics.sqnr_db(*(m.session.encode_image(pixels) for m in (reference, candidate))) >= 100
    ids = np.array([430, 82, 361, 0, 511])
    np.testing.assert_array_equal(reference.session.embed(ids), candidate.session.embed(ids))
    embeds = embeds_of(9)
    for number, step in enumerate([embeds, *(embeds_of(1) * k for k in range(1, 8))]):
        name = "decode" if number else "prefill"
        expected, found = (getattr(m.session, name)(step) for m in (reference, candidate))
        assert found.dtype == np.float32
        assert found.shape == (512,)
        assert metrics.sqnr_db(expected, found) >= 100


def test_a_prefill_forgets_what_was_before(candidate):
    session = candidate.session
    first = session.prefill(embeds_of(7))
    after = session.decode(embeds_of(1))
    session.prefill(embeds_of(40))
    session.decode(embeds_of(1))
    np.testing.assert_array_equal(session.prefill(embeds_of(7)), first)
    np.testing.assert_array_equal(session.decode(embeds_of(1)), after)


def test_results_are_copies(candidate):
    """A later step must not change logits that the caller keeps."""
    first = candidate.session.prefill(embeds_of(7))
    kept = first.copy()
    candidate.session.decode(embeds_of(1))
    np.testing.assert_array_equal(first, kept)


def test_the_cache_is_one_buffer_that_is_written_in_place(fp32_bundle):
    session = open_bundle(fp32_bundle).session
    session.prefill(embeds_of(5))
    before = [buffer.copy() for buffer in session._cache]
    session.decode(embeds_of(1))
    for old, new in zip(before, session._cache, strict=True):
        assert new.shape == (1, 2, 2048, 16)
        np.testing.assert_array_equal(new[:, :, :5], old[:, :, :5])
        assert np.abs(new[:, :, 5]).max() > 0
        assert not new[:, :, 6:].any()


@pytest.mark.parametrize(
    ("question", "count"),
    [
        ("How many circles are there?", 0),
        ("Describe the image.", 1),
        ("Describe the image.", 2),
        ("Is <image> like <image>?", 2),
        ("What is this? <image>", 1),
    ],
)
def test_answers_are_the_references(candidate, reference, question, count):
    answers = []
    for model in (reference, candidate):
        prompt = model.prompt(question, IMAGES[:count])
        answers.append(generate(model.session, prompt, (), 24).token_ids)
        assert prompt.length(16) == sum(map(len, prompt.segments)) + 16 * count
    assert answers[0] == answers[1]
    assert len(answers[0]) == 24


def test_images_change_the_answer(candidate):
    texts = {
        generate(candidate.session, candidate.prompt("Describe the image.", [image]), (), 12).token_ids
        for image in IMAGES
    }
    assert len(texts) == 2


class TestContext:
    def test_a_prompt_that_fits_exactly(self, short):
        prompt = short.prompt("Describe the image.", IMAGES[:1])
        left = 64 - prompt.length(16)
        assert len(generate(short.session, prompt, (), left).token_ids) == left

    def test_an_answer_too_long_is_refused_before_anything_runs(self, short, monkeypatch):
        prompt = short.prompt("Describe the image.", IMAGES[:1])
        left = 64 - prompt.length(16)
        monkeypatch.setattr(short.session, "encode_image", None)
        message = f"a prompt of {64 - left} tokens and an answer of up to {left + 1} exceed the context of 64"
        with pytest.raises(PromptError, match=message) as caught:
            generate(short.session, prompt, (), left + 1)
        assert "max_context_length" in str(caught.value.hint)

    def test_a_prompt_too_long_is_refused(self, short):
        prompt = short.prompt("Describe the image. " * 20, [])
        with pytest.raises(PromptError, match="exceed the context of 64 tokens"):
            generate(short.session, prompt, (), 1)

    def test_one_step_too_many_is_an_error_and_no_corruption(self, short, capfd):
        session = short.session
        session.prefill(embeds_of(63))
        last = session.decode(embeds_of(1))
        with pytest.raises(BundleError, match="a sequence of 65 tokens exceeds the context of 64"):
            session.decode(embeds_of(1))
        session.prefill(embeds_of(63))
        np.testing.assert_array_equal(session.decode(embeds_of(1)), last)
        assert capfd.readouterr().err == ""  # ONNX Runtime's own log stays out of the user's sight


class TestDamage:
    @pytest.mark.parametrize("name", ["vision_encoder", "embed_tokens", "decoder_model_merged"])
    def test_a_graph_that_is_no_graph(self, fp32_bundle, tmp_path, name, capfd):
        bundle = copy_bundle(fp32_bundle, tmp_path)
        path = bundle / "onnx" / f"{name}.onnx"
        path.write_bytes(b"\xff" * path.stat().st_size)
        with pytest.raises(BundleError, match="ONNX Runtime refuses the graph") as caught:
            open_bundle(bundle)
        assert str(path) in str(caught.value)
        assert "verify" in str(caught.value.hint)
        assert capfd.readouterr().err == ""

    def test_an_id_beyond_the_table(self, candidate):
        with pytest.raises(BundleError, match=r"ONNX Runtime refuses the graph: .*out of data bounds"):
            candidate.session.embed(np.array([100_000]))


def test_an_image_of_another_size_is_prepared(candidate, reference):
    image = Image.effect_noise((37, 411), 60).convert("RGB")
    prompts = [m.prompt("Describe the image.", [image]) for m in (candidate, reference)]
    np.testing.assert_array_equal(prompts[0].images[0], prompts[1].images[0])
    features = [candidate.session.encode_image(prompts[0].images[0])]
    assert embed_prompt(candidate.session, prompts[0], features).shape == (prompts[0].length(16), 64)
