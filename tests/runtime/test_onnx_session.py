import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from fastvlm_convert import metrics
from fastvlm_convert.errors import BundleError, PromptError
from fastvlm_convert.generate import answer_tokens, generate
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt_cache import MemoryPromptCache
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.runtime.loaded import load_bundle, load_reference
from tests.bundles import copy_bundle, export_bundle, mixed_recipe, open_bundle, recipe
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


def num_graphs() -> int:
    gc.collect()
    return sum(type(thing) is onnxruntime.InferenceSession for thing in gc.get_objects())


def test_loaded_in_turn_it_answers_alike_without_encoder_and_decoder_side_by_side(fp32_bundle, candidate):
    before = num_graphs()
    model = load_bundle(fp32_bundle, in_turn=True)
    assert num_graphs() == before + 1, "the encoder"
    answers = [m.ask(IMAGES[:1], "?", max_new_tokens=4).finish().token_ids for m in (model, candidate)]
    assert answers[0] == answers[1]
    assert num_graphs() == before + 2, "the table and the decoder"
    session = model.session
    pixels = model.prompt("?", IMAGES[1:]).images[0]
    np.testing.assert_array_equal(session.encode_image(pixels), candidate.session.encode_image(pixels))


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


NOISE = Image.effect_noise((64, 64), 90).convert("RGB")
QUESTIONS = ("What is this?", "How many circles are there?", "Is <image> like <image>?")


class Partial(MemoryPromptCache):
    """A cache that has lost something: image tokens, or the prefixes after some."""

    def __init__(self, has_features: bool, num_prefixes: int) -> None:
        super().__init__()
        self.has_features = has_features
        self.left = num_prefixes

    def get_features(self, key):
        return super().get_features(key) if self.has_features else None

    def get_prefix(self, key):
        self.left -= 1
        return super().get_prefix(key) if self.left >= 0 else None


def fill(cache: MemoryPromptCache, full: MemoryPromptCache) -> MemoryPromptCache:
    """Give a cache what another one holds."""
    cache._features, cache._prefixes = full._features, full._prefixes
    return cache


def answer_of(session, prompt, cache=None, **options):
    """The answer, and the logits that its tokens were taken from."""
    rows = []

    def choose(logits):
        rows.append(logits)
        return int(logits.argmax())

    tokens = answer_tokens(session, prompt, (), 8, choose, cache=cache, **options)
    while True:
        try:
            next(tokens)
        except StopIteration as end:
            return end.value, np.stack(rows)


@pytest.fixture(scope="module", params=["fp32", "fp16", "mixed"])
def any_model(request, fp32_bundle, fp16_bundle, tmp_path_factory):
    if request.param == "mixed":
        output = tmp_path_factory.mktemp("mixed") / "bundle"
        return open_bundle(export_bundle(GOLDEN / LLAVA / "checkpoint", output, mixed_recipe()))
    return open_bundle({"fp32": fp32_bundle, "fp16": fp16_bundle}[request.param])


class TestReuse:
    @pytest.mark.parametrize("question", QUESTIONS)
    def test_no_state_of_the_cache_changes_a_bit(self, any_model, question):
        """A prompt of two pictures, after another one about the same, after itself, and after evictions."""
        before = any_model.prompt("Is this something else?", IMAGES)
        prompt = any_model.prompt(question, IMAGES)
        ends = np.cumsum([len(segment) + 16 for segment in prompt.segments[:2]])
        first, second = (int(end + end % 2) for end in ends)
        expected, rows = answer_of(any_model.another().session, prompt)
        assert (expected.encoded_images, expected.cached_tokens) == (2, 0)
        full = MemoryPromptCache()
        answer_of(any_model.another().session, before, full)
        shares = prompt.segments[1].size == before.segments[1].size
        states = {
            "empty": (MemoryPromptCache(), 2, 0),
            "another question": (full, 0, second if shares else 0),
            "the same question": (full, 0, second),
            "no features": (fill(Partial(False, 9), full), 0, second),
            "the first picture's prefix": (fill(Partial(True, 1), full), 0, first),
            "no features but that": (fill(Partial(False, 1), full), 1, first),
            "features": (fill(Partial(True, 0), full), 0, 0),
            "nothing": (fill(Partial(False, 0), full), 2, 0),
        }
        for name, (cache, encoded, known) in states.items():
            found, again = answer_of(any_model.another().session, prompt, cache)
            assert found.token_ids == expected.token_ids, name
            np.testing.assert_array_equal(again, rows, err_msg=name)
            assert (found.encoded_images, found.cached_tokens) == (encoded, known), name

    def test_pictures_in_another_order_are_another_prompt(self, candidate):
        cache = MemoryPromptCache()
        answers = {}
        for _ in range(2):
            for order in (IMAGES, IMAGES[::-1], IMAGES[:1], IMAGES[1:]):
                prompt = candidate.prompt("Describe the image.", order)
                found, rows = answer_of(candidate.another().session, prompt, cache)
                alone, expected = answer_of(candidate.another().session, prompt)
                np.testing.assert_array_equal(rows, expected)
                assert found.token_ids == alone.token_ids
                answers.setdefault(tuple(map(id, order)), found.token_ids)
        assert len(set(answers.values())) > 2
        assert found.encoded_images == 0

    def test_from_the_third_request_on_it_is_still_about_its_own_picture(self, candidate):
        """A known fault of others: the previous picture's cache answered."""
        loaded = candidate.another()
        pictures = [
            *IMAGES,
            NOISE,
            Image.new("RGB", (40, 60), "red"),
        ]
        expected = [answer_of(loaded.session, loaded.prompt("Who?", [p]))[1] for p in pictures]
        cache = MemoryPromptCache()
        for number in (0, 1, 2, 3, 1, 0, 3, 3, 2, 0):
            prompt = loaded.prompt("Who?", [pictures[number]])
            np.testing.assert_array_equal(answer_of(loaded.session, prompt, cache)[1], expected[number])

    def test_what_is_kept_is_a_copy(self, candidate):
        """The sequence goes on, and its buffers are the next request's."""
        loaded, cache = candidate.another(), MemoryPromptCache()
        prompt, other = (loaded.prompt(text, IMAGES[:1]) for text in ("What is this?", "Who?" * 20))
        _, expected = answer_of(loaded.session, prompt, cache)
        loaded.session.prefill(embeds_of(300))
        answer_of(loaded.session, other, cache)
        np.testing.assert_array_equal(answer_of(loaded.session, prompt, cache)[1], expected)

    def test_an_answer_that_is_closed_leaves_no_trace(self, candidate):
        loaded, cache = candidate.another(), MemoryPromptCache()
        prompt = loaded.prompt("What is this?", IMAGES[:1])
        _, expected = answer_of(candidate.another().session, prompt)
        tokens = answer_tokens(loaded.session, loaded.prompt("Who?", IMAGES), (), 8, cache=cache)
        next(tokens)
        tokens.close()
        found, rows = answer_of(loaded.session, prompt, cache)
        np.testing.assert_array_equal(rows, expected)
        assert found.cached_tokens == len(prompt.segments[0]) + 16  # even; what was read before it was closed

    def test_prefixes_that_do_not_follow_each_other_are_refused(self, candidate):
        session = candidate.another().session
        session.prefill(embeds_of(9))
        with pytest.raises(ValueError, match="positions 4 to 10 of a sequence of 9"):
            session.copy_prefix(10, 4)
        first, second = session.copy_prefix(4), session.copy_prefix(9, 4)
        assert (first.start, first.stop, second.start, second.stop) == (0, 4, 4, 9)
        assert (
            first.num_bytes == 2 * 2 * 2 * 4 * 16 * 4
        )  # layers, keys and values, heads, tokens, head_dim, float32
        for wrong in ([second], [first, first]):
            with pytest.raises(ValueError, match="a prefix from"):
                session.start_from(wrong)
        expected = session.decode(embeds_of(1))
        session.start_from([first, second])
        np.testing.assert_array_equal(session.decode(embeds_of(1)), expected)


class TestThreads:
    def test_sequences_at_a_time_give_the_answers_of_one(self, any_model):
        """A known fault of others: two requests at a time corrupted both answers."""
        pictures = [*IMAGES, NOISE]
        prompts = [
            any_model.prompt(q, [p]) for p in pictures for q in ("What?", "Who is it?", "Why so? " * 9)
        ]
        expected = [answer_of(any_model.another().session, prompt)[1] for prompt in prompts]
        cache = MemoryPromptCache()
        barrier = threading.Barrier(6)

        def work(number):
            session = any_model.another().session
            barrier.wait()
            order = np.random.default_rng(number).permutation(len(prompts) * 2) % len(prompts)
            kept = cache if number % 2 else None
            return [(n, answer_of(session, prompts[n], kept)[1]) for n in order]

        with ThreadPoolExecutor(6) as pool:
            for found in pool.map(work, range(6)):
                for n, rows in found:
                    np.testing.assert_array_equal(rows, expected[n])

    def test_spinning_and_the_number_of_threads_are_the_callers(self, fp32_bundle, candidate):
        prompt = candidate.prompt("What is this?", IMAGES[:1])
        expected = answer_of(candidate.session, prompt)[1]
        loaded = load_bundle(fp32_bundle, threads=2, spinning=False)
        options = loaded.session.weights.decoder.get_session_options()
        assert options.intra_op_num_threads == 2
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        np.testing.assert_array_equal(answer_of(loaded.session, prompt)[1], expected)

    def test_sequences_share_weights_and_nothing_else(self, candidate):
        first, second = candidate.another(), candidate.another()
        assert first.session.weights is second.session.weights is candidate.session.weights
        a = first.session.prefill(embeds_of(9))
        second.session.prefill(embeds_of(40))
        b = first.session.decode(embeds_of(1))
        first.session.prefill(embeds_of(9))
        np.testing.assert_array_equal(first.session.decode(embeds_of(1)), b)
        np.testing.assert_array_equal(first.session.prefill(embeds_of(9)), a)
