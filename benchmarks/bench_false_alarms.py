"""How often `bench --against` sees a regression where nothing changed, and how often one that is there.

Simulated runs of 30 rounds, with noise of 5 % and, in every seventh round, a delay of 30 % on average as
another program causes it. Paired: both contenders in the same rounds. Unpaired: two runs. What differs
between whole runs is not simulated, because no statistic of rounds sees it.
"""

import numpy as np

from fastvlm_convert.bench.compare import compare_pairs, compare_runs
from fastvlm_convert.bench.machine import this_machine
from fastvlm_convert.bench.result import BenchResult, ContenderResult, Settings, spreads_of
from fastvlm_convert.bench.threads import Pinning

EXPERIMENTS, ROUNDS = 200, 30
RNG = np.random.default_rng(0)


def contender(name: str, factor: float) -> ContenderResult:
    """One metric of one contender."""
    delays = (RNG.random(ROUNDS) < 1 / 7) * RNG.exponential(0.3, ROUNDS)
    values = 100 * factor * np.exp(RNG.normal(0, 0.05, ROUNDS) + delays)
    samples = {"ttft_ms": tuple(map(float, values))}
    return ContenderResult(name, "x", "here", None, 1.0, 1, 1, {}, spreads_of(samples), samples, {}, {}, None)


def run(*contenders: ContenderResult) -> BenchResult:
    """A run whose calibration loop always takes the same time."""
    settings = Settings(ROUNDS, 8, 256, Pinning(1, None), (20.0,) * ROUNDS)
    return BenchResult(this_machine(), settings, contenders)


def main() -> None:
    """Print the share of experiments that fail."""
    print("slower by | allowed | paired fails | unpaired fails")
    for slower in (0, 5, 10, 20):
        for allowed in (0, 5):
            factor = 1 + slower / 100
            paired = unpaired = 0
            for _ in range(EXPERIMENTS):
                old, new = contender("baseline onnx", 1.0), contender("app onnx", factor)
                (found,) = compare_pairs(run(old, new), "baseline", allowed)
                paired += found.status == "failed"
                (found,) = compare_runs(run(new), run(contender("app onnx", 1.0)), allowed)
                unpaired += found.status == "failed"
            shares = f"{paired / EXPERIMENTS:12.1%} | {unpaired / EXPERIMENTS:14.1%}"
            print(f"{slower:7d} % | {allowed:5d} % | {shares}", flush=True)


if __name__ == "__main__":
    main()
