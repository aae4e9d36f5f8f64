"""How many workers: each strategy on measurements made for it, on recorded ones, and on any."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fastvlm_convert.serve.metrics import SCALING
from fastvlm_convert.serve.scaling import (
    PATIENCE,
    Decision,
    Limits,
    Measurement,
    Resources,
    Strategy,
    decide,
)

STRATEGIES = get_args(Strategy)
TRACES = Path(__file__).parents[1] / "data" / "serve" / "traces"
LIMITS = Limits(1, 8)
PLENTY = Resources(
    workers=1, free_cores=15, cores_per_worker=1, free_bytes=64 << 30, bytes_per_worker=1 << 30
)
CALM = Measurement(0.0, 1, 200.0, 50.0, 1.0, 1.0, 0.2, 0)
SLOW = Measurement(0.0, 1, 800.0, 60.0, 4.0, 3.0, 0.3, 5)
IDLE = Measurement(0.0, 4, None, 1.0, 0.0, 0.0, None, 0)


def over_time(*measurements: Measurement) -> list[Measurement]:
    """One every ten seconds."""
    return [replace(m, at_s=10.0 * n) for n, m in enumerate(measurements)]


def decided(strategy: Strategy, *measurements: Measurement, **resources: int) -> Decision:
    there = replace(PLENTY, **({"workers": measurements[-1].workers} | resources))
    return decide(strategy, over_time(*measurements), there, LIMITS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_changes_between_the_thresholds(strategy):
    assert decided(strategy, *[CALM] * 10) == Decision(1, "none", "within_thresholds")
    assert decide(strategy, [], PLENTY, LIMITS).direction == "none"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"p95_ms": 501.0}, "latency"),
        ({"cpu_percent": 81.0}, "cpu"),
        ({"answers_per_s": 10.1}, "throughput"),
    ],
)
@pytest.mark.parametrize("strategy", ["aggressive", "adaptive"])
def test_each_threshold_adds_a_worker(strategy, change, reason):
    calm = replace(CALM, queue=3, arrivals_per_s=5.0)
    assert decided(strategy, calm).direction == "none"
    assert decided(strategy, replace(calm, **change)) == Decision(2, "up", reason)


def test_at_the_thresholds_nothing_changes():
    edge = replace(CALM, p95_ms=500.0, cpu_percent=80.0, answers_per_s=10.0, queue=9)
    assert decided("aggressive", edge).direction == "none"
    edge = replace(IDLE, p95_ms=100.0)
    assert decided("aggressive", edge, edge, edge).direction == "none"
    edge = replace(IDLE, cpu_percent=30.0)
    assert decided("aggressive", edge, edge, edge).direction == "none"


def test_conservative_adds_and_removes_one_after_three_measurements():
    assert decided("conservative", SLOW, SLOW).direction == "none"
    assert decided("conservative", CALM, SLOW, SLOW).direction == "none"
    assert decided("conservative", SLOW, SLOW, SLOW) == Decision(2, "up", "latency")
    assert decided("conservative", IDLE, IDLE).direction == "none"
    assert decided("conservative", IDLE, IDLE, IDLE) == Decision(3, "down", "idle")


def test_aggressive_doubles_at_once_and_halves():
    four = replace(SLOW, workers=4)
    assert decided("aggressive", four) == Decision(8, "up", "latency")
    assert decided("aggressive", IDLE, IDLE).direction == "none"
    assert decided("aggressive", IDLE, IDLE, IDLE) == Decision(2, "down", "idle")


def test_adaptive_goes_to_what_the_arrival_rate_needs():
    busy = replace(SLOW, arrivals_per_s=8.0, service_s=0.35)  # 8 x 0.35 / 0.7
    assert decided("adaptive", busy) == Decision(4, "up", "latency")
    slow_but_enough = replace(SLOW, arrivals_per_s=0.5, service_s=1.0)
    assert decided("adaptive", slow_but_enough) == Decision(1, "none", "enough_workers")
    unknown = replace(SLOW, service_s=None)
    assert decided("adaptive", unknown).direction == "none"
    assert decided("adaptive", IDLE, replace(IDLE, service_s=0.1), IDLE) == Decision(
        1, "down", "arrival_rate"
    )


def test_predictive_follows_the_rate_that_is_coming():
    ramp = [replace(SLOW, arrivals_per_s=1.0 + n, service_s=0.35) for n in range(6)]
    now, soon = decided("adaptive", *ramp), decided("predictive", *ramp)
    assert soon.workers > now.workers > 1
    falling = [replace(SLOW, arrivals_per_s=6.0 - n, service_s=0.35, workers=1) for n in range(6)]
    assert decided("predictive", *falling).workers <= decided("adaptive", *falling).workers
    # Holt's method on a straight line is the line, 60 s on: 80 a second, and one more in 10 s.
    line = [replace(CALM, arrivals_per_s=1.0 + n, queue=1, service_s=0.699) for n in range(80)]
    endless = Resources(1, 1000, 1, 1000 << 30, 1 << 30)
    assert decide("predictive", over_time(*line), endless, Limits(1, 500)) == Decision(86, "up", "forecast")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_workers_need_a_queue_a_core_and_memory(strategy):
    busy = [replace(SLOW, arrivals_per_s=20.0)] * PATIENCE
    assert decided(strategy, *busy).direction == "up"
    assert decided(strategy, *busy, free_cores=0) == Decision(1, "none", "no_room")
    assert decided(strategy, *busy, free_cores=1, cores_per_worker=2).direction == "none"
    assert decided(strategy, *busy, free_bytes=(1 << 30) - 1) == Decision(1, "none", "no_room")
    assert decided(strategy, *busy, free_cores=1).workers == 2
    assert decided(strategy, *busy[:-1], replace(busy[-1], queue=0)).direction == "none"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_number_that_was_too_small_for_this_load_is_not_tried_again(strategy):
    slow = [replace(SLOW, arrivals_per_s=2.0)] * 3
    fast = [replace(IDLE, workers=2, arrivals_per_s=2.0, answers_per_s=2.0, p95_ms=80.0, service_s=0.05)] * 4
    assert decided(strategy, *fast).direction == "down"
    assert decided(strategy, *slow, *fast).direction == "none"
    less = [replace(m, arrivals_per_s=1.5) for m in fast]
    assert decided(strategy, *slow, *less).direction == "down"


NUMBERS = st.floats(0, 1000)
MEASUREMENTS = st.builds(
    Measurement,
    at_s=st.just(0.0),
    workers=st.integers(1, 16),
    p95_ms=st.none() | st.floats(0, 5000),
    cpu_percent=st.floats(0, 100),
    arrivals_per_s=st.floats(0, 500),
    answers_per_s=st.floats(0, 500),
    service_s=st.none() | st.floats(0, 60),
    queue=st.integers(0, 64),
)


@given(
    st.sampled_from(STRATEGIES),
    st.lists(MEASUREMENTS, max_size=12),
    st.integers(1, 16),
    st.integers(0, 15),
    st.builds(
        Resources,
        st.integers(1, 16),
        st.integers(0, 64),
        st.integers(1, 8),
        st.integers(0, 1 << 40),
        st.just(1 << 30),
    ),
)
def test_it_stays_within_limits_queue_cores_and_memory(strategy, window, fewest, span, resources):
    limits = Limits(fewest, fewest + span)
    resources = replace(resources, workers=min(max(resources.workers, fewest), fewest + span))
    window = over_time(*window)
    decision = decide(strategy, window, resources, limits)
    assert decide(strategy, window, resources, limits) == decision
    assert limits.min_workers <= decision.workers <= limits.max_workers
    more = decision.workers - resources.workers
    assert {"up": more > 0, "down": more < 0, "none": more == 0}[decision.direction]
    if more > 0:
        assert window[-1].queue > 0
        assert more * resources.bytes_per_worker <= resources.free_bytes
        assert more * resources.cores_per_worker <= resources.free_cores
    if more < 0:
        assert all(m.queue == 0 for m in window[-PATIENCE:])
    if more:
        assert decision.reason in SCALING[decision.direction]


class Plant:
    """Workers under a load, as a fluid: what the queue has grown by is waited for."""

    def __init__(self, arrivals_per_s: float, service_s: float, cores: int) -> None:
        self.workers, self.cores = 1, cores
        self.rate, self.service_s = arrivals_per_s, service_s
        self.queue, self.now = 0.0, 0.0

    def measure(self) -> Measurement:
        self.now += 10
        capacity = self.workers / self.service_s
        answers = min(self.rate + self.queue / 10, capacity)
        self.queue = min(64.0, max(0.0, self.queue + 10 * (self.rate - answers)))
        utilization = answers / capacity
        waits_s = self.queue / capacity + self.service_s * utilization / (1.1 - utilization)
        return Measurement(
            at_s=self.now,
            workers=self.workers,
            p95_ms=1000 * (self.service_s + waits_s),
            cpu_percent=100 * min(1.0, answers * self.service_s / self.cores),
            arrivals_per_s=self.rate,
            answers_per_s=answers,
            service_s=self.service_s,
            queue=round(self.queue) + (utilization > 0.5),
        )

    def step(self, strategy: Strategy, window: list[Measurement]) -> Decision:
        window.append(self.measure())
        resources = replace(PLENTY, workers=self.workers, free_cores=self.cores - self.workers)
        decision = decide(strategy, window[-60:], resources, Limits(1, self.cores))
        self.workers = decision.workers
        return decision


@given(st.sampled_from(STRATEGIES), st.floats(0.05, 60), st.floats(0.005, 4), st.integers(1, 16))
def test_it_does_not_swing_under_a_steady_load(strategy, rate, service_s, cores):
    plant, window = Plant(rate, service_s, cores), []
    decisions = [plant.step(strategy, window).direction for _ in range(120)]
    for n, direction in enumerate(decisions):
        if direction == "up":
            assert "down" not in decisions[n : n + 50], decisions
    assert decisions.count("down") <= cores


@given(st.sampled_from(STRATEGIES), st.floats(5, 40), st.floats(0.02, 0.09))
def test_it_comes_back_when_the_load_is_gone(strategy, rate, service_s):
    plant, window = Plant(rate, service_s, 16), []
    for _ in range(30):
        plant.step(strategy, window)
    plant.rate = 0.0
    for _ in range(60):
        plant.step(strategy, window)
    assert plant.workers == 1


class ScalingMachine(RuleBasedStateMachine):
    """Load, memory and time go as they like; the clock is the plant's."""

    def __init__(self) -> None:
        super().__init__()
        self.plant = Plant(1.0, 0.3, 16)
        self.window: list[Measurement] = []
        self.memory = 64
        self.strategy: Strategy = "adaptive"
        self.calm_since_up: int | None = None

    @rule(strategy=st.sampled_from(STRATEGIES))
    def choose(self, strategy: Strategy) -> None:
        self.strategy = strategy

    @rule(rate=st.floats(0, 60))
    def change_load(self, rate: float) -> None:
        self.plant.rate = rate
        self.calm_since_up = None

    @rule(service_s=st.floats(0.005, 4))
    def change_questions(self, service_s: float) -> None:
        self.plant.service_s = service_s
        self.calm_since_up = None

    @rule(memory=st.integers(0, 64))
    def change_memory(self, memory: int) -> None:
        self.memory = memory

    @rule(times=st.integers(1, 8))
    def pass_time(self, times: int) -> None:
        for _ in range(times):
            self.tick()

    def tick(self) -> None:
        plant = self.plant
        self.window.append(plant.measure())
        there = Resources(plant.workers, plant.cores - plant.workers, 1, self.memory << 30, 1 << 30)
        decision = decide(self.strategy, self.window[-60:], there, Limits(2, 12))
        more = decision.workers - plant.workers
        if more > 0:
            assert self.window[-1].queue > 0
            assert more <= self.memory
            self.calm_since_up = 0
        elif self.calm_since_up is not None:
            self.calm_since_up += 1
            assert more == 0 or self.calm_since_up > 50
        plant.workers = decision.workers

    @initialize()
    def begin(self) -> None:
        self.plant.workers = 2

    @invariant()
    def stays_within_limits(self) -> None:
        assert 2 <= self.plant.workers <= 12 or not self.window


TestScalingMachine = ScalingMachine.TestCase


def trace(name: str) -> list[Measurement]:
    """A recorded load; the file says how it was recorded."""
    value = json.loads((TRACES / f"{name}.json").read_text())
    return [Measurement(**measurement) for measurement in value["measurements"]]


def replayed(strategy: Strategy, name: str) -> list[Decision]:
    """What would have been decided after each measurement."""
    window = trace(name)
    return [
        decide(strategy, window[: n + 1], replace(PLENTY, workers=m.workers), LIMITS)
        for n, m in enumerate(window)
    ]


def first_up(strategy: Strategy, name: str) -> int:
    """The first measurement after which workers are added."""
    return next(n for n, decision in enumerate(replayed(strategy, name)) if decision.direction == "up")


@pytest.mark.parametrize("name", ["idle", "steady", "burst", "ramp", "sawtooth"])
def test_recorded_loads_say_how_they_were_recorded(name):
    value = json.loads((TRACES / f"{name}.json").read_text())
    assert value["made"].startswith("Recorded by benchmarks/serve_traces.py: ")
    assert len(value["measurements"]) == 19


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["idle", "steady"])
def test_recorded_calm_changes_nothing(strategy, name):
    assert {decision.direction for decision in replayed(strategy, name)} == {"none"}


def test_four_workers_without_questions_become_fewer():
    window = [replace(m, workers=4) for m in trace("idle")][:3]
    down = [decide(s, window, replace(PLENTY, workers=4), LIMITS) for s in STRATEGIES]
    assert [d.workers for d in down] == [3, 2, 1, 1]


def test_a_recorded_burst_is_answered_by_each_strategy_in_its_way():
    assert max(m.queue for m in trace("burst")[:5]) == 0
    decisions = {s: replayed(s, "burst") for s in STRATEGIES}
    assert all(d.direction == "none" for of in decisions.values() for d in of[:5])
    began = {s: first_up(s, "burst") for s in STRATEGIES}
    assert began == {"conservative": 7, "aggressive": 5, "adaptive": 5, "predictive": 5}
    assert decisions["conservative"][7].workers == decisions["aggressive"][5].workers == 2
    peak = max(trace("burst"), key=lambda m: m.arrivals_per_s)
    assert 2 < max(d.workers for d in decisions["adaptive"]) <= 8
    assert peak.service_s is not None
    assert peak.arrivals_per_s * peak.service_s / 0.7 > 7  # what one measurement alone would ask for
    assert all(d.direction == "none" for of in decisions.values() for d in of[-3:])


def test_predictive_is_ahead_of_a_recorded_ramp():
    assert first_up("predictive", "ramp") < first_up("adaptive", "ramp") < first_up("conservative", "ramp")
    soon, now = (max(d.workers for d in replayed(s, "ramp")) for s in ("predictive", "adaptive"))
    assert soon > now > 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_recorded_sawtooth_never_takes_workers_away_while_somebody_waits(strategy):
    window = trace("sawtooth")
    decisions = replayed(strategy, "sawtooth")
    assert "up" in {d.direction for d in decisions}
    assert not any(d.direction == "down" for d, m in zip(decisions, window, strict=True) if m.queue)
