"""Memory of every stage of an export beside what `plan` predicts of it.

    python -m benchmarks.stage_memory CHECKPOINT --recipe int4 --target onnx
    python -m benchmarks.stage_memory CHECKPOINT --recipe int4 --target onnx --samples 16

Without `--samples` nothing is calibrated. With it, the demo generator's pictures and questions are used, and
its answers too, because a model of random weights (random_checkpoint.py) would never end one. The limit: the
highest stage within a fifth of its prediction where the default mix calibrates, as `export` alone does it;
other data has none of its texts and needs less. Nothing is read from the cache or put there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quantize_cost import write_calibration
from fastvlm_convert.recipe import Recipe, load_recipe, without_data

MB = 1e6


def call(*arguments: object) -> dict[str, Any]:
    """The document that a command prints, in a process of its own."""
    command = [sys.executable, "-m", "fastvlm_convert", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    document: dict[str, Any] = json.loads(done.stdout)
    if document["status"] == "error":
        raise SystemExit(document["error"]["message"])
    return document


def stages(checkpoint: Path, recipe: Path, target: str, data: list[object]) -> list[str]:
    """Rows of the table."""
    asked = [checkpoint, "--recipe", recipe, "--target", target]
    predicted = {need["stage"]: need["peak_memory_bytes"] for need in call("plan", *asked)["stages"]}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        made = call("export", *asked, "--no-cache", "-o", bundle, *data)
    rows = []
    for cost in made["stages"]:
        stage, peak = cost["stage"], cost["peak_memory_bytes"]
        need = predicted.get(stage)
        ratio = "- | -" if need is None else f"{need / MB:.0f} | {need / peak:.2f}"
        rows.append(f"| {target} | {stage} | {cost['cpu_seconds']:.1f} | {peak / MB:.0f} | {ratio} |")
    highest, expected = made["peak_memory_bytes"], max(predicted.values())
    rows.append(
        f"| {target} | peak | | {highest / MB:.0f} | {expected / MB:.0f} | {expected / highest:.2f} |"
    )
    return rows


def main() -> None:
    """Print one row per stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--target", action="append", choices=("onnx", "coreml", "mlx"))
    parser.add_argument("--samples", type=int, help="calibrate with so many")
    arguments = parser.parse_args()
    recipe: Recipe = load_recipe(arguments.recipe)
    with tempfile.TemporaryDirectory() as folder:
        data: list[object] = []
        if arguments.samples is None:
            recipe = without_data(recipe)
        else:
            recipe = replace(recipe, calibration=replace(recipe.calibration, num_samples=arguments.samples))
            data = ["--calibration", write_calibration(Path(folder) / "pictures", arguments.samples)]
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        print("| target | stage | CPU seconds | MB | predicted | ratio |\n|---|---|---|---|---|---|")
        for target in arguments.target or ("onnx",):
            for row in stages(arguments.checkpoint, path, target, data):
                print(row, flush=True)


if __name__ == "__main__":
    main()
