"""Time, peak memory and sizes of exporting a model of Apple's true dimensions (random weights).

    python benchmarks/export_cost.py 0.5b

Limit at 0.5B, vision included: 0.4 GiB peak, in every precision. Each export runs in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_checkpoint import write_checkpoint

from fastvlm_convert.weights.published import DECODERS

# The child prints its own peak: unlike a parent's view it starts with the program itself.
CHILD = """
import sys
from fastvlm_convert.bench.worker import peak_memory_bytes
from fastvlm_convert.cli.main import main
code = main(sys.argv[1:])
print(peak_memory_bytes(), file=sys.stderr)
raise SystemExit(code)
"""


def measure(checkpoint: Path, recipe: str, bundle: Path) -> tuple[float, int, dict[str, int]]:
    """Export once; seconds, peak bytes and the sizes of all files."""
    command = ["export", str(checkpoint), "--target", "onnx", "--recipe", recipe, "-o", str(bundle), "--json"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    return seconds, int(done.stderr.split()[-1]), json.loads(done.stdout)["files"]


def main() -> None:
    """Print one row a recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=DECODERS)
    arguments = parser.parse_args()
    print("| recipe | seconds | peak GiB | vision MB | decoder and table MB | total MB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(checkpoint, arguments.size)
        for recipe in ("fp32", "fp16", "int8", "int4"):
            seconds, peak, files = measure(checkpoint, recipe, Path(folder) / recipe)
            vision = sum(n for f, n in files.items() if "vision_encoder" in f)
            text = sum(n for f, n in files.items() if "decoder_model" in f or "embed_tokens" in f)
            total = sum(files.values())
            sizes = " | ".join(f"{n / 1e6:.1f}" for n in (vision, text, total))
            print(f"| {recipe} | {seconds:.1f} | {peak / 2**30:.2f} | {sizes} |")


if __name__ == "__main__":
    main()
