"""Rates and bans, with a clock that tests turn; and who a client is."""

import sys

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastvlm_convert.serve.errors import RateLimitedError
from fastvlm_convert.serve.limits import (
    MAX_BANNED,
    REPEATED,
    Bans,
    RateLimiter,
    Strikes,
    client_address,
)

CLIENTS = st.sampled_from(["a", "b", "c"])
LIMIT, BAN_AFTER, BAN_S = 3, 2, 90.0


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class RateMachine(RuleBasedStateMachine):
    """Beside the limiter, a list of all requests that it took."""

    def __init__(self):
        super().__init__()
        self.clock = FakeClock()
        self.limiter = RateLimiter(LIMIT, self.clock)
        self.taken = {"a": [], "b": [], "c": []}

    def in_last_minute(self, client):
        return [at for at in self.taken[client] if at > self.clock.now - 60]

    @rule(seconds=st.one_of(st.floats(0, 80), st.sampled_from([0.0, 1.0, 20.0, 59.999, 60.0])))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @rule(client=CLIENTS)
    def ask(self, client):
        if len(self.in_last_minute(client)) < LIMIT:
            self.limiter.check(client)
            self.taken[client].append(self.clock.now)
            return
        with pytest.raises(RateLimitedError) as caught:
            self.limiter.check(client)
        assert caught.value.status == 429
        assert caught.value.retry_after_s == int(caught.value.retry_after_s) >= 1

    @precondition(lambda self: any(len(self.in_last_minute(c)) >= LIMIT for c in self.taken))
    @rule()
    def waiting_as_told_is_enough_and_no_second_too_long(self):
        client = next(c for c in self.taken if len(self.in_last_minute(c)) >= LIMIT)
        with pytest.raises(RateLimitedError) as caught:
            self.limiter.check(client)
        wait = caught.value.retry_after_s
        if wait > 1:
            self.clock.now += wait - 1.001
            assert len(self.in_last_minute(client)) >= LIMIT
            self.clock.now += 1.001
        else:
            self.clock.now += wait
        self.limiter.check(client)
        self.taken[client].append(self.clock.now)

    @invariant()
    def no_minute_has_more_than_allowed(self):
        for times in self.taken.values():
            for first, last in zip(times, times[LIMIT:], strict=False):
                assert last - first >= 60 - 1e-6

    @invariant()
    def what_is_remembered_is_bounded(self):
        assert len(self.limiter) <= LIMIT * len(self.taken)


class BanMachine(RuleBasedStateMachine):
    """Beside the bans, when each client had incidents, and until when it is banned."""

    def __init__(self):
        super().__init__()
        self.clock = FakeClock()
        self.bans = Bans(BAN_AFTER, BAN_S, self.clock)
        self.incidents = {"a": [], "b": [], "c": []}
        self.until = {"a": 0.0, "b": 0.0, "c": 0.0}

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @rule(client=CLIENTS)
    def incident(self, client):
        recent = [at for at in self.incidents[client] if at + 60 > self.clock.now]
        self.incidents[client] = [*recent, self.clock.now]
        is_too_many = len(self.incidents[client]) >= BAN_AFTER
        assert self.bans.strike(client) == is_too_many
        if is_too_many:
            self.incidents[client] = []
            self.until[client] = self.clock.now + BAN_S

    @rule(client=CLIENTS)
    def ask(self, client):
        left = self.until[client] - self.clock.now
        if left <= 0:
            self.bans.check(client)
            return
        with pytest.raises(RateLimitedError) as caught:
            self.bans.check(client)
        assert caught.value.code == "banned"
        assert left <= caught.value.retry_after_s < left + 1 or caught.value.retry_after_s == 1


TestRates = RateMachine.TestCase
TestBans = BanMachine.TestCase


def test_no_limit():
    limiter = RateLimiter(0, FakeClock())
    for _ in range(1000):
        limiter.check("a")
    assert len(limiter) == 0


def test_one_client_does_not_use_up_anothers():
    limiter = RateLimiter(1, FakeClock())
    limiter.check("a")
    limiter.check("b")
    with pytest.raises(RateLimitedError):
        limiter.check("a")


def test_a_clock_that_stands_still_ends_nothing():
    limiter = RateLimiter(2, FakeClock())
    limiter.check("a")
    limiter.check("a")
    for _ in range(3):
        with pytest.raises(RateLimitedError) as caught:
            limiter.check("a")
        assert caught.value.retry_after_s == 60


def test_memory_is_bounded_under_many_clients():
    clock = FakeClock()
    limiter = RateLimiter(100, clock, max_times=1000)
    for number in range(20_000):
        clock.now += 0.0001
        limiter.check(f"client {number}")
        assert len(limiter) <= 1000
    for number in range(100):
        limiter.check("busy")
        limiter.check(f"other {number}")
    with pytest.raises(RateLimitedError):  # whoever asks often is not forgotten for those who ask once
        limiter.check("busy")


def test_clients_of_long_ago_are_forgotten():
    clock = FakeClock()
    limiter = RateLimiter(100, clock)
    for number in range(500):
        limiter.check(f"client {number}")
    clock.now += 60
    limiter.check("new")
    assert len(limiter) == 1


def test_bans_are_off_by_default_and_bounded():
    none = Bans(0, 60, FakeClock())
    assert not any(none.strike("a") for _ in range(1000))
    none.check("a")
    clock = FakeClock()
    bans = Bans(1, 60, clock)
    for number in range(MAX_BANNED + 10):
        assert bans.strike(str(number))
    assert len(bans) == MAX_BANNED
    clock.now += 61
    bans.strike("late")
    assert len(bans) == 1
    assert sys.getsizeof(bans) < 1000


def test_refusals_again_and_again_are_noticed_once_each_time():
    clock = FakeClock()
    strikes = Strikes(clock=clock)
    found = [strikes.strike("a") for _ in range(2 * REPEATED)]
    assert [n + 1 for n, is_noticed in enumerate(found) if is_noticed] == [REPEATED, 2 * REPEATED]
    slow = []
    for _ in range(5 * REPEATED):
        clock.now += 60 / (REPEATED - 1)
        slow.append(strikes.strike("b"))
    assert not any(slow)


# Who a client is


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "client"),
    [
        ("192.0.2.1", [], [], "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], [], "192.0.2.1"),  # anybody can write it
        ("10.0.0.1", ["198.51.100.7"], ["10.0.0.0/8"], "198.51.100.7"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.7"], ["10.0.0.0/8"], "198.51.100.7"),
        ("10.0.0.1", ["6.6.6.6", "198.51.100.7, 10.0.0.2"], ["10.0.0.0/8"], "198.51.100.7"),
        ("10.0.0.1", ["10.0.0.9, 10.0.0.2"], ["10.0.0.0/8"], "10.0.0.9"),
        ("10.0.0.1", [], ["10.0.0.0/8"], "10.0.0.1"),
        ("10.0.0.1", ["nonsense"], ["10.0.0.1"], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6, nonsense"], ["10.0.0.1"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7:4711"], ["10.0.0.1"], "198.51.100.7"),
        ("10.0.0.1", ["[2001:db8:1:2:3::4]:4711"], ["10.0.0.1"], "2001:db8:1:2::/64"),
        ("10.0.0.1", [","], ["10.0.0.1"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.1," * 100_000], ["10.0.0.1"], "10.0.0.1"),
        ("2001:db8:1:2:3::4", [], [], "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", [], [], "192.0.2.1"),
        ("::ffff:10.0.0.1", ["198.51.100.7"], ["10.0.0.0/8"], "198.51.100.7"),
        ("fd00::1", ["198.51.100.7"], ["10.0.0.0/8", "fd00::/8"], "198.51.100.7"),
        (None, ["198.51.100.7"], ["10.0.0.0/8"], "local"),
        ("testclient", [], [], "local"),
    ],
)
def test_who_a_client_is(peer, forwarded, trusted, client):
    assert client_address(peer, forwarded, trusted) == client
