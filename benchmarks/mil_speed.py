"""Speed and memory of the ML-program interpreter against torch eager, on the same machine in the same run.

    python -m benchmarks.mil_speed VISION.mlpackage CHECKPOINT
    python -m benchmarks.mil_speed DECODER.mlpackage CHECKPOINT --steps 20

Limits: 1.3 times our torch reference's time for vision, 1.5 times for a decoder token; peak memory of the
interpreter alone at most the weights in float32 plus 1 GB. The checkpoint may be random
(`random_checkpoint.py`). The two alternate, so that other work on the machine slows both; the ratio is that
of the medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.mil import Interpreter
from fastvlm_convert.mil.description import FunctionSpec
from fastvlm_convert.runtime.loaded import load_reference

LIMITS = {"vision": 1.3, "decoder": 1.5}
MASKED = -1e4

CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from mil_speed import interpreter_alone
from fastvlm_convert.peak_memory import peak_memory_bytes
weights = interpreter_alone(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
print(json.dumps({"peak": peak_memory_bytes(), "weights": weights}))
"""


def example(function: FunctionSpec, position: int) -> dict[str, np.ndarray]:
    """Inputs of a function: a picture, or one token at a position."""
    rng = np.random.default_rng(position)
    inputs = {}
    for spec in function.inputs:
        shape = spec.example_shape
        if spec.color is not None:
            inputs[spec.name] = rng.integers(0, 256, shape).astype(np.float32)
        elif not spec.type.element.is_float:
            inputs[spec.name] = np.full(shape, position if "position" in spec.name else 0, np.int32)
        elif "mask" in spec.name:
            visible = np.arange(shape[-1]) <= position + np.arange(shape[-2])[:, None]
            inputs[spec.name] = np.where(visible, 0, MASKED).astype(np.float32)[None, None]
        else:
            inputs[spec.name] = rng.random(shape, np.float32)
    return inputs


def component(interpreter: Interpreter) -> tuple[str, str]:
    """Which part of the model a package holds, and the function to time."""
    name = "decode" if "decode" in interpreter.functions else interpreter.default_function
    return ("decoder" if interpreter.functions[name].states else "vision"), name


def interpreter_alone(package: Path, name: str, steps: int) -> int:
    """Run without torch's model in memory; return the bytes of all decoded weights."""
    interpreter = Interpreter(package)
    state = interpreter.make_state(name)
    for step in range(steps):
        interpreter.predict(example(interpreter.functions[name], step), state, name)
    return interpreter.decoded_bytes


def compare(package: Path, checkpoint: Path, steps: int) -> dict[str, object]:
    """Times of both, run alternately."""
    interpreter = Interpreter(package)
    part, name = component(interpreter)
    function = interpreter.functions[name]
    state = interpreter.make_state(name)
    reference = load_reference(open_checkpoint(checkpoint)).session
    hidden = next(s.shape[-1] for s in function.inputs)
    if part == "decoder":
        reference.prefill(np.zeros((1, hidden or 1), np.float32))

    def ours(step: int) -> None:
        interpreter.predict(example(function, step), state, name)

    def theirs(step: int) -> None:
        inputs = next(iter(example(function, step).values()))
        if part == "vision":
            reference.encode_image(inputs / 255 if function.inputs[0].color else inputs)
        else:
            reference.decode(inputs[0])

    times = take_turns(ours, theirs, steps)
    ratio = statistics.median(times["interpreter"]) / statistics.median(times["torch"])
    return {"part": part, "function": name, "times_s": times, "ratio": ratio, "limit": LIMITS[part]}


def take_turns(
    ours: Callable[[int], None], theirs: Callable[[int], None], steps: int
) -> dict[str, list[float]]:
    """Seconds of each call; the first round, in which weights are decoded, does not count."""
    times: dict[str, list[float]] = {"interpreter": [], "torch": []}
    for step in range(steps + 1):
        for name, call in (("interpreter", ours), ("torch", theirs)):
            start = time.perf_counter()
            call(step)
            if step:
                times[name].append(time.perf_counter() - start)
    return times


def peak_memory(package: Path, name: str, steps: int) -> tuple[int, int]:
    """Peak bytes of a process that does nothing else, and the bytes of the decoded weights."""
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-c", CHILD, folder, str(package), name, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["weights"]


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = compare(arguments.package, arguments.checkpoint, arguments.steps)
    peak, weights = peak_memory(arguments.package, str(found["function"]), 2)
    found |= {"peak_memory_bytes": peak, "decoded_weights_bytes": weights}
    if arguments.json:
        print(json.dumps(found))
        return
    times = found["times_s"]
    assert isinstance(times, dict)
    ours, theirs = (statistics.median(times[k]) * 1e3 for k in ("interpreter", "torch"))
    print("| part | interpreter ms | torch ms | ratio | limit | peak GB | weights in float32 GB |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {found['part']} | {ours:.0f} | {theirs:.0f} | {found['ratio']:.2f} | {found['limit']} | "
        f"{peak / 1e9:.2f} | {weights / 1e9:.2f} |"
    )


if __name__ == "__main__":
    main()
