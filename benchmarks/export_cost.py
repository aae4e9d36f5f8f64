"""Time, peak memory and sizes of exporting a model of Apple's true dimensions (random weights).

    python -m benchmarks.export_cost 0.5b
    python -m benchmarks.export_cost 0.5b --target coreml --checkpoint FOLDER

Limits at 0.5B, including vision: a peak of 0.4 GiB for ONNX and of 1 GiB for Core ML, in every precision.
What `plan` predicted is printed beside each size and peak. Each export runs in a process of its own.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import write_checkpoint
from fastvlm_convert.manifest import FILE_NAME as MANIFEST
from fastvlm_convert.recipe import shipped_recipes
from fastvlm_convert.weights.published import DECODERS

# The child prints its own peak: what a parent sees includes the time before the program starts.
CHILD = """
import sys
from fastvlm_convert.peak_memory import peak_memory_bytes
from fastvlm_convert.cli.main import main
code = main(sys.argv[1:])
print(peak_memory_bytes(), file=sys.stderr)
raise SystemExit(code)
"""


def measure(checkpoint: Path, target: str, recipe: str, bundle: Path) -> tuple[float, int, dict[str, int]]:
    """Export once; return seconds, peak bytes and the sizes of all files."""
    command = ["export", str(checkpoint), "--target", target, "--recipe", recipe, "-o", str(bundle), "--json"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    return seconds, int(done.stderr.split()[-1]), json.loads(done.stdout)["files"]


def plan(checkpoint: Path, target: str, recipe: str) -> dict[str, Any]:
    """What `plan` says."""
    command = ["plan", str(checkpoint), "--target", target, "--recipe", recipe, "--json"]
    code = [sys.executable, "-m", "fastvlm_convert", *command]
    return json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout)


def row(checkpoint: Path, target: str, recipe: str, bundle: Path) -> str:
    """One row of the table."""
    planned = plan(checkpoint, target, recipe)
    seconds, peak, files = measure(checkpoint, target, recipe, bundle)
    worst = max(abs(planned["files"][file] / size - 1) for file, size in files.items() if file != MANIFEST)
    vision = sum(n for f, n in files.items() if "vision" in f)
    text = sum(n for f, n in files.items() if "decoder" in f or "embed_tokens" in f)
    total = sum(n for f, n in files.items() if f != MANIFEST)
    sizes = " | ".join(f"{n / 1e6:.1f}" for n in (vision, text, total, planned["total_bytes"]))
    predicted = planned["peak_memory_bytes"] / 2**30
    return (
        f"| {recipe} | {target} | {seconds:.1f} | {peak / 2**30:.2f} | {predicted:.2f} "
        f"| {sizes} | {100 * worst:.2f} % |"
    )


def main() -> None:
    """Print one row per recipe and target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=DECODERS)
    parser.add_argument("--target", action="append", choices=("onnx", "coreml"), help="ONNX by default")
    parser.add_argument("--recipe", action="append", choices=tuple(shipped_recipes()), help="four by default")
    parser.add_argument("--checkpoint", type=Path, help="use this checkpoint instead of writing one")
    arguments = parser.parse_args()
    print(
        "| recipe | target | seconds | peak GiB | predicted | vision MB | decoder and table MB | total MB "
        "| predicted | worst file |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / "checkpoint"
            write_checkpoint(checkpoint, arguments.size)
        for recipe in arguments.recipe or ("fp32", "fp16", "int8", "int4"):
            for target in arguments.target or ("onnx",):
                bundle = Path(folder) / "bundle"
                print(row(checkpoint, target, recipe, bundle), flush=True)
                shutil.rmtree(bundle)


if __name__ == "__main__":
    main()
