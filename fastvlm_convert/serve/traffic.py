"""What passed through a bundle's queue since it was looked at last."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

_MOST: Final = 1000  # answers between two looks; where nobody looks, the newest


@dataclass(frozen=True)
class Passed:
    """What passed between two looks.

    Attributes:
        arrivals: Questions that came, those that were refused included.
        answers: Questions that were answered.
        p95_ms: 95th percentile of their time, from arrival to the end; None without answers.
        service_s: Mean time of them in a slot; None without answers.
    """

    arrivals: int
    answers: int
    p95_ms: float | None
    service_s: float | None


class Traffic:
    """Counts questions that no cache answered."""

    def __init__(self) -> None:
        self._arrivals = 0
        self._answers = 0
        self._times: deque[tuple[float, float]] = deque(maxlen=_MOST)

    def came(self) -> None:
        """A question came."""
        self._arrivals += 1

    def answered(self, waited_s: float, service_s: float) -> None:
        """One was answered, after some time in the queue and some in a slot."""
        self._answers += 1
        self._times.append((waited_s + service_s, service_s))

    def take(self) -> Passed:
        """What passed since the last call."""
        times, self._times = self._times, deque(maxlen=_MOST)
        arrivals, answers = self._arrivals, self._answers
        self._arrivals = self._answers = 0
        if not times:
            return Passed(arrivals, answers, None, None)
        whole = sorted(total for total, _ in times)
        p95 = whole[math.ceil(0.95 * len(whole)) - 1]
        return Passed(arrivals, answers, 1000 * p95, sum(service for _, service in times) / len(times))
