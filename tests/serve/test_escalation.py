"""A small bundle answers, and a large one where it is unsure: one answer, of one of them."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_convert.errors import UsageError
from fastvlm_convert.serve.engine import Piece, Reply, Sampling, StageTimings
from fastvlm_convert.serve.errors import DeadlineError, EngineFailedError, RequestError, UnavailableError
from fastvlm_convert.serve.escalation import Decided, Escalation, decide, make_escalation
from fastvlm_convert.serve.router import make_router

ROUTER = make_router(["small", "large"], large="large")
GREEDY = Sampling(max_tokens=8)


def reply(text: str, mean_logprob: float | None) -> Reply:
    return Reply(text, "stop", 60, 0, len(text), StageTimings(), "miss", mean_logprob)


@dataclass
class Bundles:
    """Answers of two bundles, piece by piece, and what was asked of them."""

    logprob: float | None
    fails: dict[str, RequestError] = field(default_factory=dict)
    hangs: str = ""
    asked: list[tuple[str, bool]] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    async def ask(self, bundle: str, wants_logprob: bool) -> AsyncGenerator[Piece | Reply, None]:
        self.asked.append((bundle, wants_logprob))
        text = f"I am {bundle}."
        try:
            for count, char in enumerate(text, 1):
                await asyncio.sleep(0)
                if bundle == self.hangs and count == 3:
                    await asyncio.sleep(60)
                if bundle in self.fails and count == 3:
                    raise self.fails[bundle]
                self.given.append(bundle)
                yield Piece(char, count)
            yield reply(text, self.logprob if wants_logprob else None)
        finally:
            self.closed.append(bundle)


async def read(decided: Decided) -> tuple[str, Reply]:
    *pieces, last = [item async for item in decided.pieces]
    assert isinstance(last, Reply)
    assert all(isinstance(piece, Piece) for piece in pieces)
    return "".join(piece.text for piece in pieces), last


def answered(bundles: Bundles, threshold: float = -0.1) -> tuple[Decided, str, Reply]:
    async def run() -> tuple[Decided, str, Reply]:
        decided = await decide(Escalation("large", threshold), "small", bundles.ask)
        return (decided, *await read(decided))

    return asyncio.run(run())


def test_a_sure_answer_is_kept_and_the_large_bundle_not_asked():
    bundles = Bundles(logprob=-0.05)
    decided, text, last = answered(bundles)
    assert (decided.bundle, text, last.text) == ("small", "I am small.", "I am small.")
    assert bundles.asked == [("small", True)]
    assert decided.headers == {"x-fastvlm-model": "small", "x-fastvlm-escalation": "kept"}


def test_an_unsure_answer_is_replaced_by_the_large_bundle_s():
    bundles = Bundles(logprob=-0.5)
    decided, text, last = answered(bundles)
    assert (decided.bundle, text, last.text) == ("large", "I am large.", "I am large.")
    assert bundles.asked == [("small", True), ("large", False)]
    assert decided.headers == {"x-fastvlm-model": "large", "x-fastvlm-escalation": "escalated"}
    assert decided.first is not None
    assert decided.first.usage.model_dump() == {
        "outcome": "escalated",
        "first_model": "small",
        "first_mean_logprob": -0.5,
        "first_prompt_tokens": 60,
        "first_completion_tokens": 11,
    }


@given(st.floats(max_value=0, allow_nan=False), st.floats(max_value=0, allow_nan=False))
def test_what_is_streamed_is_one_answer_whatever_the_threshold(logprob, threshold):
    decided, text, last = answered(Bundles(logprob), threshold)
    assert decided.bundle == ("small" if logprob >= threshold else "large")
    assert text == last.text == f"I am {decided.bundle}."


def test_an_answer_whose_probability_is_no_number_is_not_kept():
    assert answered(Bundles(logprob=math.nan), threshold=-math.inf)[0].bundle == "large"


def test_nothing_is_streamed_before_the_small_answer_is_whole_and_the_large_one_streams():
    async def run(logprob: float) -> int:
        bundles = Bundles(logprob)
        decided = await decide(Escalation("large", -0.1), "small", bundles.ask)
        assert bundles.given.count("small") == len("I am small.")
        first = await anext(decided.pieces)
        assert isinstance(first, Piece)
        return bundles.given.count("large")

    assert asyncio.run(run(-0.05)) == 0
    assert asyncio.run(run(-0.5)) == 1


def test_an_engine_without_log_probabilities_is_an_error_and_no_silent_choice():
    with pytest.raises(EngineFailedError, match="no log-probabilities"):
        answered(Bundles(logprob=None))


@pytest.mark.parametrize("error", [DeadlineError("late"), UnavailableError("full", retry_after_s=1.0)])
@pytest.mark.parametrize("bundle", ["small", "large"])
def test_an_error_of_either_is_the_request_s(bundle, error):
    bundles = Bundles(logprob=-0.5, fails={bundle: error})
    with pytest.raises(type(error)):
        answered(bundles)
    assert bundles.closed[-1] == bundle
    assert ("large", False) not in bundles.asked or bundle == "large"


@pytest.mark.parametrize("hanging", ["small", "large"])
def test_cancelling_ends_the_bundle_that_runs_and_starts_no_other(hanging):
    bundles = Bundles(logprob=-0.5, hangs=hanging)

    async def request() -> None:
        decided = await decide(Escalation("large", -0.1), "small", bundles.ask)
        async with aclosing(decided.pieces) as pieces:
            async for _ in pieces:
                pass

    async def run() -> None:
        task = asyncio.create_task(request())
        while bundles.given.count(hanging) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bundles.closed[-1] == hanging  # at once, not when garbage is collected

    asyncio.run(run())
    assert [name for name, _ in bundles.asked] == (["small"] if hanging == "small" else ["small", "large"])


@pytest.mark.parametrize(
    ("requested", "bundle", "sampling", "concerned"),
    [
        ("fastvlm", "small", GREEDY, True),
        (None, "small", GREEDY, True),
        ("small", "small", GREEDY, False),  # it wants this one
        ("fastvlm", "large", GREEDY, False),
        ("fastvlm", "small", replace(GREEDY, temperature=0.7), False),
    ],
)
def test_only_greedy_answers_of_the_group_are_escalated(requested, bundle, sampling, concerned):
    assert Escalation("large", -0.1).concerns(ROUTER, requested, bundle, sampling) is concerned


def test_it_is_off_unless_asked_for():
    assert make_escalation(None, None, ROUTER) is None
    assert make_escalation("large", -0.1, ROUTER) == Escalation("large", -0.1)


@pytest.mark.parametrize(
    ("names", "weights", "large", "message"),
    [
        (["small", "large"], None, "lerge", "no bundle 'lerge'"),
        (["small", "large"], None, "fastvlm", "no bundle 'fastvlm'"),
        (["large"], None, "large", "every request goes to 'large'"),
        (["small", "large"], {"small": 0.0, "large": 1.0}, "large", "every request goes to 'large'"),
    ],
)
def test_nonsense_is_refused(names, weights, large, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_escalation(large, -0.1, make_router(names, weights, large=large))
    assert caught.value.hint
