"""Questions in threads of the server, over one set of weights."""

import asyncio
import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.generate import greedy
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt import Message, user_message
from fastvlm_convert.prompt_cache import image_key
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle
from fastvlm_convert.serve.engine import Piece, Question, Reply, Sampling
from fastvlm_convert.serve.engines.embedded import EmbeddedEngine
from fastvlm_convert.serve.engines.sequence import answer_question
from fastvlm_convert.serve.errors import CancelledError, DeadlineError, EngineFailedError, UnavailableError
from fastvlm_convert.serve.prompt_caches import PromptCaches
from fastvlm_convert.serve.served_bundle import ServedBundle, open_served_bundle
from tests.bundles import copy_bundle, graph_path
from tests.serve.servers import PICTURES

MILLION = 1_000_000


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return open_served_bundle(demo_bundle)


@pytest.fixture(scope="module")
def loaded(demo_bundle):
    return load_bundle(demo_bundle)


def ask(
    bundle: ServedBundle, number: int = 0, text: str = "Describe the image.", **sampling: object
) -> Question:
    messages: list[Message] = [user_message(text, [load_image(PICTURES / f"{number:02}.png")])]
    prompt = bundle.prompt(messages)
    keys = tuple(image_key(image) for image in prompt.images)
    return Question("r", prompt, keys, Sampling(**{"max_tokens": 100, **sampling}), float("inf"))  # type: ignore[arg-type]


def run_text(loaded: LoadedModel, number: int, text: str = "Describe the image.") -> str:
    stream = loaded.reply([user_message(text, [load_image(PICTURES / f"{number:02}.png")])])
    stream.finish()
    return stream.text


async def whole(engine: EmbeddedEngine, question: Question) -> tuple[list[Piece], Reply]:
    items = [item async for item in engine.answer(question)]
    *pieces, reply = items
    assert isinstance(reply, Reply)
    return [piece for piece in pieces if isinstance(piece, Piece)], reply


def test_many_questions_at_once_are_answered_as_one_alone_is(bundle, loaded):
    async def main() -> None:
        engine = EmbeddedEngine(bundle, 3, 1, PromptCaches(MILLION, MILLION).of_model("m"))
        assert not engine.status().is_ready
        await engine.start()
        assert (engine.status().slots, engine.status().executed_by) == (3, loaded.session.executed_by)
        slots = asyncio.Semaphore(3)

        async def one(number: int) -> str:
            async with slots:
                pieces, reply = await whole(engine, ask(bundle, number % 5))
                assert "".join(piece.text for piece in pieces) == reply.text
                return reply.text

        texts = await asyncio.gather(*(one(number) for number in range(20)))
        expected = [run_text(loaded, number) for number in range(5)]
        assert texts == expected * 4
        await engine.stop()

    asyncio.run(main())


def test_a_picture_is_encoded_once_and_the_reply_says_what_was_known(bundle):
    async def main() -> None:
        engine = EmbeddedEngine(bundle, 1, 1, PromptCaches(MILLION, MILLION).of_model("m"))
        await engine.start()
        pieces, first = await whole(engine, ask(bundle))
        assert (first.cache, first.cached_tokens) == ("miss", 0)
        assert first.timings.vision_ms > 0
        pieces, second = await whole(engine, ask(bundle, text="What is at the top left?"))
        assert second.cache == "prefix"
        assert second.cached_tokens > 16
        assert {piece.cache for piece in pieces} == {"prefix"}
        _, other = await whole(engine, replace(ask(bundle), scope="another client"))
        assert other.cache == "miss"
        assert other.text == first.text
        await engine.stop()

    asyncio.run(main())


def test_features_alone_help_where_prefixes_are_not_kept(bundle, loaded):
    async def main() -> None:
        engine = EmbeddedEngine(bundle, 1, 1, PromptCaches(MILLION, 0).of_model("m"))
        await engine.start()
        await whole(engine, ask(bundle))
        _, reply = await whole(engine, ask(bundle, text="What is at the top left?"))
        assert (reply.cache, reply.cached_tokens) == ("feature", 0)
        assert reply.text == run_text(loaded, 0, "What is at the top left?")
        await engine.stop()

    asyncio.run(main())


def counting(
    loaded: LoadedModel, on_decode: threading.Event | None = None
) -> tuple[LoadedModel, list[float]]:
    """The model, and when each of its decode steps began; the third sets the event."""
    session = loaded.session.another()  # type: ignore[attr-defined]
    steps: list[float] = []
    decode = session.decode

    def counted(inputs_embeds: np.ndarray) -> np.ndarray:
        steps.append(time.monotonic())
        if on_decode is not None and len(steps) == 3:
            on_decode.set()
        return np.asarray(decode(inputs_embeds))

    session.decode = counted
    return replace(loaded, session=session), steps


def test_generation_stops_within_one_token_of_a_cancellation(bundle, loaded):
    question = ask(bundle)
    model, steps = counting(loaded, question.cancelled)
    with pytest.raises(CancelledError):
        list(answer_question(model, question))
    assert len(steps) == 3


def test_generation_stops_within_one_token_of_the_deadline(bundle, loaded):
    model, steps = counting(loaded)
    question = replace(ask(bundle), deadline=2.5)
    with pytest.raises(DeadlineError):
        list(answer_question(model, question, clock=lambda: float(len(steps))))
    assert len(steps) == 3


def test_a_question_that_nobody_waits_for_is_not_decoded(bundle, loaded):
    model, steps = counting(loaded)
    question = ask(bundle)
    question.cancelled.set()
    with pytest.raises(CancelledError):
        list(answer_question(model, question))
    assert steps == []


def test_a_picture_is_not_encoded_for_a_client_that_left(bundle, loaded):
    """At 0.5B that takes ten seconds of a slot; what was encoded already is kept."""
    session = loaded.session.another()
    encode, encoded = session.encode_image, []
    cache = PromptCaches(10 * MILLION, 0).of_model("m")

    def counted(pixels: np.ndarray) -> np.ndarray:
        encoded.append(pixels)
        question.cancelled.set()
        return np.asarray(encode(pixels))

    session.encode_image = counted
    model = replace(loaded, session=session, cache=cache)
    messages: list[Message] = [user_message("?", [load_image(PICTURES / f"0{n}.png") for n in (1, 2)])]
    question = replace(ask(bundle), prompt=bundle.prompt(messages), image_keys=("one", "two"))
    for _ in range(2):  # while it is answered, and before
        with pytest.raises(CancelledError):
            list(answer_question(model, question))
        assert len(encoded) == 1
    assert cache.get_features("one") is not None


@pytest.mark.parametrize("length", [1, 2, 5, 13])
def test_no_part_of_a_stop_text_is_ever_given(bundle, loaded, length):
    text = run_text(loaded, 0)
    for start in range(0, len(text) - length, 7):
        stop = text[start : start + length]
        *pieces, reply = list(answer_question(loaded, ask(bundle, stop=("\x00", stop))))
        assert isinstance(reply, Reply)
        expected = text[: text.index(stop)]
        assert (reply.text, reply.finish_reason) == (expected, "stop")
        shown = ""
        for piece in pieces:
            assert isinstance(piece, Piece)
            shown += piece.text
            assert expected.startswith(shown)
        assert shown == expected


def test_a_stop_text_that_is_begun_and_not_finished_is_part_of_the_answer(bundle, loaded):
    text = run_text(loaded, 0)
    *pieces, reply = list(answer_question(loaded, ask(bundle, stop=(text[-9:] + "!", text[4:9] + "\x00"))))
    assert reply.text == text
    assert "".join(piece.text for piece in pieces) == text


def test_tokens_are_counted_to_the_one_that_ended_the_answer(bundle, loaded):
    *_, reply = list(answer_question(loaded, ask(bundle)))
    stream = loaded.reply([user_message("Describe the image.", [load_image(PICTURES / "00.png")])])
    assert isinstance(reply, Reply)
    assert reply.answer_tokens == stream.finish().timings.answer_tokens
    *_, cut = list(answer_question(loaded, ask(bundle, max_tokens=4)))
    assert isinstance(cut, Reply)
    assert (cut.answer_tokens, cut.finish_reason) == (4, "length")


def test_the_mean_log_probability_is_that_of_the_tokens_and_only_on_request(bundle, loaded):
    *_, reply = list(answer_question(loaded, ask(bundle)))
    assert isinstance(reply, Reply)
    assert reply.mean_logprob is None
    *_, reply = list(answer_question(loaded, replace(ask(bundle), wants_logprob=True)))
    assert isinstance(reply, Reply)
    logprobs: list[float] = []

    def choose(logits: np.ndarray) -> int:
        token = greedy(logits)
        exact = logits.astype(np.float64)
        logprobs.append(exact[token] - math.log(np.exp(exact).sum()))
        return token

    from fastvlm_convert.generate import generate

    generate(loaded.session, ask(bundle).prompt, loaded.eos_token_ids, 100, choose)
    assert reply.mean_logprob == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-9)
    assert reply.mean_logprob < 0


def test_an_error_of_the_runtime_is_one_of_the_engine(bundle):
    async def main() -> None:
        engine = EmbeddedEngine(bundle, 1)
        await engine.start()
        question = ask(bundle)
        broken = replace(
            question, prompt=replace(question.prompt, images=(np.zeros((1, 3, 8, 8), np.float32),))
        )
        with pytest.raises(EngineFailedError):
            await whole(engine, broken)
        _, reply = await whole(engine, question)
        assert reply.finish_reason == "stop"
        await engine.stop()

    asyncio.run(main())


def test_stopping_ends_what_runs_and_refuses_what_comes(bundle):
    async def main() -> None:
        engine = EmbeddedEngine(bundle, 1)
        await engine.start()
        running = asyncio.create_task(whole(engine, ask(bundle)))
        while engine.status().running == 0:
            await asyncio.sleep(0)
        await engine.stop()
        with pytest.raises(UnavailableError) as stopped:
            await running
        assert stopped.value.code == "draining"
        with pytest.raises(UnavailableError):
            await whole(engine, ask(bundle))
        assert not engine.status().is_ready

    asyncio.run(main())


def test_a_bundle_that_cannot_be_loaded_is_told_when_the_engine_starts(demo_bundle, tmp_path: Path):
    copy = copy_bundle(demo_bundle, tmp_path)
    graph_path(copy, "decoder").write_bytes(b"no graph")
    from fastvlm_convert.errors import BundleError

    with pytest.raises(BundleError):
        asyncio.run(EmbeddedEngine(open_served_bundle(copy), 2).start())
