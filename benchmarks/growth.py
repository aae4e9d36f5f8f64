"""Time and memory of quantize, export and verify against the size of the model (random weights).

    python -m benchmarks.growth                                     (0.1B and 0.5B)
    python -m benchmarks.growth 1.5b 7b-2-layers --results FILE --plot growth.svg
    python -m benchmarks.growth 1.5b --checkpoint FOLDER --stage quantize --stage 'export onnx'

Every command runs in a process of its own, without the cache, on `int4` without data. Seconds are of the
processor. What is in FILE is not measured again: rows are added to it, and the last run draws them all.
`7b-2-layers` has the width, the tables and the encoder of 7B and two of its 28 layers; nothing is
extrapolated. `verify` asks one question about one picture and four tokens of an answer; it holds the
reference in float32, and is `not_run` where that alone exceeds `--max-memory`.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from benchmarks.growth_plot import Line, draw
from benchmarks.measured_process import machine_text, run_measured
from benchmarks.paired import markdown
from benchmarks.quantize_cost import write_calibration
from benchmarks.random_checkpoint import write_model
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.recipe import load_recipe, without_data
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.published import published_config
from fastvlm_convert.weights.shapes import weight_shapes

ANSWER = 4  # tokens
STAGES = ("quantize", "export onnx", "export coreml", "verify onnx")
GATE_FAILED = 1  # exit code: random weights do not survive 4 bits


def half_width() -> ModelConfig:
    """A decoder of half the width and half the layers of 0.5B: 0.1B, and the same encoder."""
    config = published_config("0.5b", 12)
    decoder = replace(config.decoder, hidden_size=448, num_heads=7, num_kv_heads=1, intermediate_size=2432)
    return replace(config, projector_width=448, decoder=decoder)


SHAPES = {
    "0.1b": half_width,
    "0.5b": lambda: published_config("0.5b"),
    "1.5b": lambda: published_config("1.5b"),
    "7b-2-layers": lambda: published_config("7b", 2),
}


@dataclass(frozen=True)
class Row:
    """What one stage took for one shape.

    Attributes:
        shape: One of `SHAPES`.
        parameters: Of the whole model, encoder included.
        stage: One of `STAGES`.
        cpu_s: Seconds of processor time; None where it is not run.
        peak_bytes: The most memory resident; None where it is not run.
        not_run: Why.
    """

    shape: str
    parameters: int
    stage: str
    cpu_s: float | None
    peak_bytes: int | None
    not_run: str | None = None


@dataclass(frozen=True)
class Fit:
    """A line through what a stage took.

    Attributes:
        base: Where it begins, without parameters.
        per_billion: What a billion parameters add.
        worst: The largest distance of a figure from the line, as a share of the line.
    """

    base: float
    per_billion: float
    worst: float

    def text(self, digits: int) -> str:
        """`0.31 +0.02 per billion`."""
        base, slope = (round(value, digits) + 0.0 for value in (self.base, self.per_billion))  # no -0.0
        return f"{base:.{digits}f} {slope:+.{digits}f} per billion"

    def distance(self, num_sizes: int) -> str:
        """The largest distance in percent; two sizes lie on their line whatever they are."""
        return f"{100 * self.worst:.0f} %" if num_sizes > 2 else "-"


def fit(parameters: np.ndarray, values: np.ndarray) -> Fit:
    """The least-squares line; at least two sizes, [n] each."""
    billions = np.asarray(parameters, np.float64) / 1e9
    slope, base = np.polyfit(billions, values, 1)
    line = base + slope * billions
    return Fit(float(base), float(slope), float(np.abs(values / line - 1).max()))


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model."""
    return sum(int(np.prod(shape)) for shape in weight_shapes(config).values())


def stage_commands(folder: Path, checkpoint: Path) -> dict[str, list[object]]:
    """What each stage runs, in order; a stage takes what those before it made in a folder."""
    quantized, bundle = folder / "quantized", folder / "bundle"
    recipe = without_data(load_recipe("int4"))
    recipe = replace(recipe, gates=replace(recipe.gates, max_new_tokens=ANSWER))
    written = folder / "recipe.yaml"
    written.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    pictures = write_calibration(folder / "pictures", 1)
    return {
        "quantize": ["quantize", checkpoint, "--recipe", written, "-o", quantized],
        "export onnx": ["export", quantized, "--target", "onnx", "-o", bundle],
        "export coreml": ["export", quantized, "--target", "coreml", "-o", folder / "coreml"],
        "verify onnx": ["verify", bundle, "--reference", checkpoint, "--images", pictures],
    }


def measure(shape: str, folder: Path, asked: argparse.Namespace) -> list[Row]:
    """The stages that are asked for, of one shape."""
    config = SHAPES[shape]()
    parameters = count_parameters(config)
    checkpoint = asked.checkpoint
    if checkpoint is None:
        checkpoint = folder / "checkpoint"
        write_model(checkpoint, config)
    elif count_parameters(open_checkpoint(checkpoint).config) != parameters:
        raise SystemExit(f"{checkpoint} has other dimensions than {shape}")
    rows = []
    for stage, command in stage_commands(folder, checkpoint).items():
        if stage not in asked.stage:
            continue
        needed = 4 * parameters / 2**30
        if stage.startswith("verify") and needed > asked.max_memory:
            reason = f"the float32 reference alone takes {needed:.1f} GiB"
            rows.append(Row(shape, parameters, stage, None, None, reason))
            continue
        allowed = (0, GATE_FAILED) if stage.startswith("verify") else (0,)
        tool = [sys.executable, "-m", "fastvlm_convert", *command, "--no-cache", "--json"]
        cost, _ = run_measured(tool, allowed)
        rows.append(Row(shape, parameters, stage, cost.cpu_s, cost.peak_bytes))
        print(f"# {shape} {stage}: {cost.cpu_s:.1f} CPU s, {cost.peak_bytes / 2**30:.2f} GiB", flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """Every figure."""
    lines = [
        [
            row.shape,
            f"{row.parameters / 1e9:.2f}",
            row.stage,
            f"not_run: {row.not_run}" if row.cpu_s is None else f"{row.cpu_s:.1f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
        ]
        for row in rows
    ]
    return markdown(["shape", "parameters, billions", "stage", "CPU s", "peak GiB"], lines)


def fits(rows: list[Row]) -> str:
    """Lines through the figures of each stage that has two sizes and more."""
    lines = []
    for stage in STAGES:
        found = [row for row in rows if row.stage == stage and row.cpu_s is not None]
        if len({row.parameters for row in found}) < 2:
            continue
        sizes = np.array([row.parameters for row in found])
        time = fit(sizes, np.array([row.cpu_s for row in found], np.float64))
        memory = fit(sizes, np.array([row.peak_bytes for row in found], np.float64) / 2**30)
        lines.append(
            [
                stage,
                time.text(1),
                time.distance(len(found)),
                memory.text(2),
                memory.distance(len(found)),
            ]
        )
    return markdown(["stage", "CPU s", "farthest", "peak GiB", "farthest"], lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draw time and memory of every stage."""
    lines = []
    for stage in STAGES:
        found = sorted(
            (row for row in rows if row.stage == stage and row.cpu_s is not None and row.peak_bytes),
            key=lambda row: row.parameters,
        )
        sizes = [row.parameters / 1e9 for row in found]
        times = [float(row.cpu_s or 0) for row in found]
        lines.append(Line(stage, sizes, times, [(row.peak_bytes or 0) / 2**30 for row in found]))
    path.write_text(draw([line for line in lines if line.sizes]), encoding="utf-8")


def main() -> None:
    """Measure what is not known yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["0.1b", "0.5b"], help=", ".join(SHAPES))
    parser.add_argument("--results", type=Path, help="a JSON file of rows, read and extended")
    parser.add_argument("--plot", type=Path, help="the SVG file to draw")
    parser.add_argument("--checkpoint", type=Path, help="of the one shape, instead of writing one")
    parser.add_argument("--stage", action="append", choices=STAGES, help="all by default")
    parser.add_argument("--max-memory", type=float, default=8.0, metavar="GIB")
    asked = parser.parse_args()
    if unknown := set(asked.shapes) - set(SHAPES):
        parser.error(f"unknown shapes {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    if asked.checkpoint is not None and len(asked.shapes) != 1:
        parser.error("--checkpoint is of one shape")
    asked.stage = asked.stage or list(STAGES)
    known = asked.results is not None and asked.results.exists()
    rows = [Row(**row) for row in json.loads(asked.results.read_text())] if known else []
    for shape in asked.shapes:
        if shape in {row.shape for row in rows}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(shape, Path(folder), asked)
        if asked.results is not None:
            asked.results.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"{machine_text()}\n\n{table(rows)}\n\n{fits(rows)}")
    if asked.plot is not None:
        plot(rows, asked.plot)


if __name__ == "__main__":
    main()
