"""What quantization costs the answers of several models, with intervals, beside how others quantize.

    python -m benchmarks.quality demo unseen real noisy --output RESULTS
    python -m benchmarks.quality --table RESULTS

Models: `demo`, `unseen` (training/unseen), `real` (SmolLM2-135M, see benchmarks/real_model.py), `noisy` (the
same with noise of half a step on its weights, for blocks of 32), or the folder of a model of the demo's kind.
Each is asked about 320 pictures, or the prompts of prompts.jsonl, that nothing was calibrated with: blurred
and noisy pictures, of the unseen style clean ones too; the real model is asked about clean scenes. The float
model answers greedily; every scheme is compared with it token by token, and answers by itself where it would
say something else and the right answer is known. Intervals are 95 % bootstraps over pictures or prompts;
ratios are paired. The figures are of the weights alone: activations stay float32.

RESULTS holds a file a model, written after every scheme; schemes that are in it are not measured again.
"""

import argparse
import json
import logging
import os
import re
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.inputs import PICTURES, QuestionSet, folder_of, question_sets
from benchmarks.quality.judging import (
    Asked,
    Model,
    answered,
    judge,
    load,
    prepare,
    read_again,
    right_answers,
)
from benchmarks.quality.schemes import schemes
from benchmarks.quality.table import tables
from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.weights.fold import fold


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--output", type=Path, help="the folder RESULTS")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the tables of results")
    parser.add_argument("--only", default="", help="only schemes whose name matches this regular expression")
    parser.add_argument("--sets", default="", help="the same for sets of questions")
    parser.add_argument("--work", type=Path, help="where models and caches are kept; a folder that goes away")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    arguments = parser.parse_args()
    if arguments.table is not None:
        files = sorted(arguments.table.glob("*.json"))
        print(tables({path.stem: json.loads(path.read_text()) for path in files}))
        return
    if not arguments.models or arguments.output is None:
        parser.error("name models and --output, or --table")
    logging.disable(logging.WARNING)  # ONNX Runtime logs every node
    warnings.simplefilter("ignore")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        os.environ.setdefault("FASTVLM_CONVERT_CACHE", str(work / "cache"))
        for model in arguments.models:
            path = arguments.output / f"{Path(model).name}.json"
            measure(model, folder_of(model, work), path, arguments)


def measure(model: str, folder: Path, path: Path, arguments: argparse.Namespace) -> None:
    """Add the schemes that are asked for to a model's results."""
    checkpoint = open_checkpoint(folder)
    result: dict[str, Any] = {"sha256": checkpoint.sha256, "sets": {}, "schemes": {}}
    if path.exists():
        result = json.loads(path.read_text())
        if result["sha256"] != checkpoint.sha256:
            raise SystemExit(f"{path} is of another checkpoint: remove it")
    chosen = {
        name: asked
        for name, asked in question_sets(model, arguments.pictures).items()
        if re.search(arguments.sets, name)
    }
    runs: dict[str, Asked] = {}
    for label, make in schemes(checkpoint):
        missing = chosen.keys() - result["schemes"].get(label, {"sets": {}})["sets"].keys()
        if not missing or not re.search(arguments.only, label):
            continue
        runs = runs or float_runs(checkpoint, chosen, result, path)
        start = time.process_time()
        made = make()
        changed = load(checkpoint, made.weights)
        score = None if made.score is None else asdict(made.score)
        entry = result["schemes"].setdefault(label, {"score": score, "sets": {}})
        for name in sorted(missing):
            found = entry["sets"][name] = judge(checkpoint, chosen[name], runs[name], changed)
            save(result, path)
            mean = sum(map(sum, found["kl"])) / sum(map(len, found["kl"]))
            print(
                f"{model}, {name}, {label}: KL {mean:.3g}, {time.process_time() - start:.0f} CPU s",
                flush=True,
            )


def save(result: dict[str, Any], path: Path) -> None:
    """Write results, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(result))


def float_runs(
    checkpoint: Checkpoint, sets: dict[str, QuestionSet], result: dict[str, Any], path: Path
) -> dict[str, Asked]:
    """What the float model answers and computes; the answers are kept with the results."""
    model, runs = load(checkpoint, fold(checkpoint.weights)), {}
    for name, asked in sets.items():
        run, stored = prepare(checkpoint, asked), result["sets"].get(name)
        if stored is None:
            run = answered(checkpoint, model, run, asked.max_tokens)
            result["sets"][name] = {
                "has_pictures": bool(asked.pictures),
                "clusters": [n if q.picture is None else q.picture for n, q in enumerate(asked.questions)],
                "answers": [ids.tolist() for ids in run.answers],
                "right": right_answers(checkpoint, asked, run.answers),
            }
            save(result, path)
        else:
            run = replace(run, answers=tuple(np.asarray(ids, np.int64) for ids in stored["answers"]))
        runs[name] = with_hidden(model, run, path.parent / "hidden" / f"{checkpoint.sha256[:16]}-{name}.npy")
    return runs


def with_hidden(model: Model, run: Asked, file: Path) -> Asked:
    """A run with the float model's residual stream, which a file keeps: to read answers takes a minute."""
    lengths = [len(ids) for ids in run.answers]
    if file.exists() and len(stored := np.load(file)) == sum(lengths):
        return replace(run, hidden=torch.split(torch.from_numpy(stored), lengths))
    run = read_again(model, run)
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as partial, partial.open("wb") as stream:
        np.save(stream, torch.cat(run.hidden).numpy())
    return run


if __name__ == "__main__":
    main()
