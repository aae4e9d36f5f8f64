import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastvlm_convert.serve.breaker import Breaker, Pass
from fastvlm_convert.serve.errors import (
    CancelledError,
    DeadlineError,
    EngineFailedError,
    RequestError,
    UnavailableError,
)

FAILURES, RESET_S = 5, 10.0


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(FAILURES, RESET_S, clock)
    for _ in range(FAILURES):
        breaker.before().failed()
    assert breaker.state == "open"
    return breaker


def refusal(breaker: Breaker) -> UnavailableError:
    with pytest.raises(UnavailableError) as caught:
        breaker.before()
    assert (caught.value.code, caught.value.status) == ("breaker_open", 503)
    return caught.value


def test_five_failures_in_a_row_open_it():
    breaker = Breaker(FAILURES, RESET_S, Clock())
    for _ in range(2):
        for _ in range(FAILURES - 1):
            breaker.before().failed()
        breaker.before().succeeded()
    assert breaker.state == "closed"
    for _ in range(FAILURES):
        assert breaker.state == "closed"
        breaker.before().failed()
    assert breaker.state == "open"


def test_it_says_when_to_come_again():
    clock = Clock()
    breaker = opened(clock)
    assert refusal(breaker).retry_after_s == RESET_S
    clock.now += 4
    assert refusal(breaker).retry_after_s == RESET_S - 4
    clock.now += RESET_S - 4
    assert breaker.state == "half_open"
    breaker.before()
    assert refusal(breaker).retry_after_s > 0


def test_the_pause_doubles_up_to_160_s_and_starts_again_after_a_success():
    clock = Clock()
    breaker = opened(clock)
    pauses = []
    for _ in range(7):
        pauses.append(refusal(breaker).retry_after_s)
        clock.now += pauses[-1]
        breaker.before().failed()
    assert pauses == [10, 20, 40, 80, 160, 160, 160]
    clock.now += 160
    breaker.before().succeeded()
    assert breaker.state == "closed"
    for _ in range(FAILURES):
        breaker.before().failed()
    assert refusal(breaker).retry_after_s == RESET_S


def test_one_of_many_concurrent_questions_is_the_trial():
    clock = Clock()
    breaker = opened(clock)
    clock.now += RESET_S
    running, refused = 0, 0

    async def ask():
        nonlocal running, refused
        try:
            async with breaker.guard():
                running += 1
                await asyncio.sleep(0.01)
        except UnavailableError:
            refused += 1

    async def ask_all():
        await asyncio.gather(*(ask() for _ in range(40)))

    asyncio.run(ask_all())
    assert (running, refused, breaker.state) == (1, 39, "closed")


@pytest.mark.parametrize(
    "error",
    [
        DeadlineError("too late"),
        CancelledError("gone"),
        UnavailableError("full", code="queue_full", retry_after_s=1.0),
        UnavailableError("died", code="worker_died", retry_after_s=1.0),
        RequestError("no"),
        asyncio.CancelledError(),
        GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_runtime_error_neither_counts_nor_ends_a_trial(error):
    clock = Clock()
    breaker = Breaker(FAILURES, RESET_S, clock)

    async def ask(with_error):
        with pytest.raises(type(with_error)):
            async with breaker.guard():
                raise with_error

    for _ in range(FAILURES - 1):
        asyncio.run(ask(EngineFailedError("broken")))
    for _ in range(2 * FAILURES):
        asyncio.run(ask(error))
    assert breaker.state == "closed"
    asyncio.run(ask(EngineFailedError("broken")))  # the fifth in a row, for what was between does not count
    assert breaker.state == "open"
    clock.now += RESET_S
    for _ in range(3):
        asyncio.run(ask(error))
        assert breaker.state == "half_open"
    asyncio.run(ask(EngineFailedError("broken")))
    assert refusal(breaker).retry_after_s == 2 * RESET_S


def test_what_began_before_it_opened_no_longer_matters():
    clock = Clock()
    breaker = Breaker(FAILURES, RESET_S, clock)
    late = [breaker.before() for _ in range(3)]
    for _ in range(FAILURES):
        breaker.before().failed()
    clock.now += RESET_S
    late[0].succeeded()
    assert breaker.state == "half_open"
    trial = breaker.before()
    late[1].abandoned()
    refusal(breaker)
    late[2].failed()
    trial.succeeded()
    assert breaker.state == "closed"


def test_it_can_be_asked_before_a_question_waits_for_its_turn():
    clock = Clock()
    breaker = Breaker(FAILURES, RESET_S, clock)
    breaker.check()
    for _ in range(FAILURES):
        breaker.before().failed()
    with pytest.raises(UnavailableError):
        breaker.check()
    clock.now += RESET_S
    for _ in range(3):
        breaker.check()  # whoever asks is not the trial
    trial = breaker.before()
    with pytest.raises(UnavailableError):
        breaker.check()
    trial.succeeded()
    breaker.check()


def test_only_the_first_end_counts():
    breaker = Breaker(1, RESET_S, Clock())
    given = breaker.before()
    given.succeeded()
    given.failed()
    assert breaker.state == "closed"


class BreakerMachine(RuleBasedStateMachine):
    """Any order of beginnings, ends and waiting, against what the issue says, written down once more."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(FAILURES, RESET_S, self.clock)
        self.running: list[
            tuple[Pass, str, int]
        ] = []  # and whether it is a trial, and how often it opened before
        self.in_a_row = 0
        self.num_opened = 0
        self.pause = 0.0  # 0: closed
        self.opens_at = 0.0

    def expected(self) -> str:
        if not self.pause:
            return "closed"
        return "open" if self.clock.now < self.opens_at else "half_open"

    def has_trial(self) -> bool:
        return any(kind == "trial" and era == self.num_opened for _, kind, era in self.running)

    @rule()
    def begin(self):
        state = self.expected()
        if state == "open" or (state == "half_open" and self.has_trial()):
            error = refusal(self.breaker)
            assert error.retry_after_s > 0
            if state == "open":
                assert error.retry_after_s == pytest.approx(self.opens_at - self.clock.now)
        else:
            kind = "trial" if state == "half_open" else "plain"
            self.running.append((self.breaker.before(), kind, self.num_opened))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(["failed", "failed", "succeeded", "abandoned"]))
    def end(self, data, outcome):
        place = data.draw(st.integers(0, len(self.running) - 1))
        given, kind, era = self.running.pop(place)
        getattr(given, outcome)()
        if era != self.num_opened or (kind == "plain" and self.pause):
            return
        if kind == "trial":
            if outcome == "succeeded":
                self.pause, self.in_a_row = 0.0, 0
                self.num_opened += 1
            elif outcome == "failed":
                self.open(min(2 * self.pause, 160.0))
        elif outcome == "failed":
            self.in_a_row += 1
            if self.in_a_row == FAILURES:
                self.open(RESET_S)
        elif outcome == "succeeded":
            self.in_a_row = 0

    @precondition(lambda self: not self.pause)
    @rule()
    def fail_until_it_opens(self):
        for _ in range(FAILURES - self.in_a_row):
            self.breaker.before().failed()
        self.in_a_row = FAILURES
        self.open(RESET_S)

    def open(self, pause):
        self.pause, self.opens_at = pause, self.clock.now + pause
        self.num_opened += 1

    @rule(seconds=st.sampled_from([0.5, 9.0, 10.0, 60.0, 160.0]))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def state_is_as_expected(self):
        assert self.breaker.state == self.expected()


BreakerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestBreaker = BreakerMachine.TestCase
