"""Admission: who runs, who waits, who is refused, and what they are told."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_convert.serve.admission import Admission
from fastvlm_convert.serve.errors import UnavailableError


class Clock:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def learn(admission: Admission, clock: Clock, seconds: float) -> None:
    """Let one question take a slot for some time."""
    async with admission.slot(clock.now + 1000):
        clock.now += seconds


def test_questions_run_at_once_up_to_the_slots_and_in_the_order_in_which_they_came():
    async def main() -> None:
        admission = Admission(8, lambda: 2)
        order: list[int] = []
        gates = [asyncio.Event() for _ in range(5)]

        async def one(number: int) -> None:
            async with admission.slot(float("inf")):
                order.append(number)
                await gates[number].wait()

        tasks = [asyncio.create_task(one(n)) for n in range(5)]
        await settle()
        assert order == [0, 1]
        assert (admission.running, admission.waiting) == (2, 3)
        for number in (1, 0, 2, 3, 4):
            gates[number].set()
            await settle()
        assert order == [0, 1, 2, 3, 4]
        await asyncio.gather(*tasks)
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(main())


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_queue_is_never_longer_than_its_limit(limit):
    async def main() -> None:
        admission = Admission(limit, lambda: 1)

        async def one() -> None:
            async with admission.slot(float("inf")):
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(one()) for _ in range(10)]
        longest = 0
        while not all(task.done() for task in tasks):
            longest = max(longest, admission.waiting)
            await asyncio.sleep(0)
        assert longest == limit
        refusals = [error for task in tasks if (error := task.exception()) is not None]
        assert len(refusals) == 10 - 1 - limit
        for error in refusals:
            assert isinstance(error, UnavailableError)
            assert (error.code, error.retry_after_s) == ("queue_full", 1)

    asyncio.run(main())


def test_a_wait_beyond_the_deadline_is_refused_at_once_with_a_time_after_which_it_would_not_be():
    async def main() -> None:
        clock = Clock()
        admission = Admission(64, lambda: 2, clock)
        await learn(admission, clock, 10.0)
        assert admission.expected_wait_s() == 0
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(admission.slot(clock.now + 30))
            # 10 s a question, two slots: a slot comes free every 5 s.
            assert admission.expected_wait_s() == 5
            waiting = []
            for number in range(1, 4):
                waiting.append(asyncio.create_task(stack.enter_async_context(admission.slot(clock.now + 30))))
                await settle()
                assert admission.waiting == number
            assert admission.expected_wait_s() == 20
            async with asyncio.timeout(1):
                with pytest.raises(UnavailableError) as refusal:
                    async with admission.slot(clock.now + 25):
                        pass
            assert refusal.value.code == "expected_wait"
            assert refusal.value.retry_after_s == 5
            assert admission.waiting == 3
            # After these seconds at that pace one has begun, and the same request would be taken.
            waiting.pop().cancel()
            await settle()
            taken = asyncio.create_task(stack.enter_async_context(admission.slot(clock.now + 25)))
            await settle()
            assert admission.waiting == 3
            for task in (*waiting, taken):
                task.cancel()
            await settle()

    asyncio.run(main())


def test_a_free_slot_is_given_however_long_questions_take():
    """Else a server whose questions take longer than a deadline would never learn that they got faster."""

    async def main() -> None:
        clock = Clock()
        admission = Admission(64, lambda: 1, clock)
        await learn(admission, clock, 60.0)
        async with admission.slot(clock.now + 1) as waited:
            assert waited == 0

    asyncio.run(main())


def test_a_request_that_is_cancelled_leaves_the_queue_and_never_runs():
    async def main() -> None:
        admission = Admission(8, lambda: 1)
        ran: list[str] = []

        async def one(name: str) -> None:
            async with admission.slot(float("inf")):
                ran.append(name)

        async with admission.slot(float("inf")):
            first, second = asyncio.create_task(one("left")), asyncio.create_task(one("stayed"))
            await settle()
            first.cancel()
            await settle()
            assert admission.waiting == 1
        await second
        assert ran == ["stayed"]
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(main())


def test_a_slot_that_came_in_the_moment_of_leaving_goes_to_the_next():
    async def main() -> None:
        admission = Admission(8, lambda: 1)

        async def one() -> None:
            async with admission.slot(float("inf")):
                await asyncio.sleep(0)

        async with admission.slot(float("inf")):
            leaving, next_one = asyncio.create_task(one()), asyncio.create_task(one())
            await settle()
        leaving.cancel()  # its turn has come, but it has not run since
        await asyncio.wait_for(next_one, 1)
        assert leaving.cancelled()
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(main())


def test_more_slots_let_more_run():
    async def main() -> None:
        slots = 0
        admission = Admission(8, lambda: slots)

        async def one() -> None:
            async with admission.slot(float("inf")):
                await asyncio.sleep(10)

        tasks = [asyncio.create_task(one()) for _ in range(3)]
        await settle()
        assert (admission.running, admission.waiting) == (0, 3)
        slots = 2
        admission.dispatch()
        await settle()
        assert (admission.running, admission.waiting) == (2, 1)
        for task in tasks:
            task.cancel()
        await settle()
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(main())


def test_only_whole_answers_count_for_the_average():
    async def main() -> None:
        clock = Clock()
        admission = Admission(8, lambda: 1, clock)
        failing = admission.slot(float("inf"))
        await failing.__aenter__()
        clock.now += 100
        await failing.__aexit__(ZeroDivisionError, None, None)
        assert admission.average_cost_s is None
        await learn(admission, clock, 10.0)
        await learn(admission, clock, 20.0)
        assert admission.average_cost_s == pytest.approx(12.0)

    asyncio.run(main())


@given(st.lists(st.sampled_from(["come", "leave", "end", "fail"]), max_size=60), st.integers(0, 4))
def test_whatever_happens_the_counts_are_right(steps, limit):
    """Against a model: so many run, so many wait, in order, and nobody waits beside a free slot."""

    async def main() -> None:
        admission = Admission(limit, lambda: 2)
        running: list[tuple[int, asyncio.Event, list[bool]]] = []
        waiting: dict[int, asyncio.Task[None]] = {}
        expected: list[int] = []

        async def one(number: int) -> None:
            fails: list[bool] = []
            async with admission.slot(float("inf")):
                waiting.pop(number, None)
                done = asyncio.Event()
                running.append((number, done, fails))
                await done.wait()
                if fails:
                    raise ZeroDivisionError

        tasks = []
        for number, step in enumerate(steps):
            if step == "come":
                task = asyncio.create_task(one(number))
                waiting[number] = task
                tasks.append(task)
                is_full = len(running) >= 2 and len(expected) >= limit
                if not is_full and len(running) >= 2:
                    expected.append(number)
                await settle()
                if is_full:
                    assert isinstance(task.exception(), UnavailableError)
                    del waiting[number]
            elif step == "leave" and expected:
                left = expected.pop(len(expected) // 2)
                waiting.pop(left).cancel()
                await settle()
            elif step in ("end", "fail") and running:
                _, done, fails = running.pop(0)
                if step == "fail":
                    fails.append(True)
                done.set()
                await settle()
                if expected:
                    assert running[-1][0] == expected.pop(0)
            assert admission.running == len(running) <= 2
            assert admission.waiting == len(expected) <= limit
            assert not expected or len(running) == 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(main())
