"""Time and memory of vision encoders, side by side: integers folded at loading, resident integers, floats.

    fastvlm-convert export CHECKPOINT --recipe int8 -o folded            (onnx.vision_weights: folded)
    fastvlm-convert export CHECKPOINT --recipe resident.yaml -o resident (onnx.vision_weights: resident)
    python -m benchmarks.vision_weights folded resident

Every bundle's encoder runs in a process of its own, one picture each in turn. Printed are CPU seconds of
loading and of a picture (which other load on the machine distorts less than wall time), their ratio to the
first bundle's in the same round, and the peak of resident memory.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.peak_memory import peak_memory_bytes


def serve_encoder(path: Path, size: int, threads: int) -> None:
    """Encode a picture for every line of standard input; one JSON line each."""
    import onnxruntime

    start = time.process_time()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).random((1, 3, size, size), np.float32)
    name = session.get_inputs()[0].name
    print(json.dumps({"load_s": time.process_time() - start}), flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        session.run(None, {name: pixels})
        spent = time.process_time() - start
        print(json.dumps({"cpu_s": spent, "peak_bytes": peak_memory_bytes()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        serve_encoder(asked.bundles[0], asked.child, asked.threads)
        return
    encoders = {}
    for bundle in asked.bundles:
        manifest = load_manifest(bundle)
        graph = bundle / manifest.artifact("onnx", "vision").files[0]
        encoders[bundle.name] = graph, manifest.contract.image_size
    compare_encoders(encoders, asked.rounds, asked.threads)


def compare_encoders(encoders: Mapping[str, tuple[Path, int]], num_rounds: int, threads: int) -> None:
    """Print time and memory of vision graphs, each with the edge of its pictures, by name."""
    children = []
    for graph, size in encoders.values():
        command = [sys.executable, "-m", "benchmarks.vision_weights", str(graph)]
        command += ["--child", str(size), "--threads", str(threads)]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    loads = [json.loads(child.stdout.readline())["load_s"] for child in children]
    rounds = []
    for _ in range(num_rounds + 1):
        answers = []
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
            answers.append(json.loads(child.stdout.readline()))
        rounds.append(answers)
    for child in children:
        child.stdin.close()
        child.wait()
    times = np.array([[a["cpu_s"] for a in answers] for answers in rounds[1:]])  # the first warms up
    ratios = times / times[:, :1]
    print(f"{threads} threads, {num_rounds} rounds; CPU seconds of one picture, median [least, most]")
    for i, encoder in enumerate(encoders):
        t, r = times[:, i], ratios[:, i]
        peak = rounds[-1][i]["peak_bytes"] / 2**20
        picture = f"{np.median(t):6.2f} [{t.min():.2f}, {t.max():.2f}]"
        ratio = f"{np.median(r):5.2f} [{r.min():.2f}, {r.max():.2f}]"
        print(f"{encoder:24} load {loads[i]:5.2f}  picture {picture}  ratio {ratio}  peak {peak:5.0f} MiB")


if __name__ == "__main__":
    main()
