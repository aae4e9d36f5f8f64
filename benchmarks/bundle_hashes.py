"""Record the SHA-256 of every file the tool makes, to compare before and after a refactoring.

    python -m benchmarks.bundle_hashes record before.json
    python -m benchmarks.bundle_hashes record after.json
    python -m benchmarks.bundle_hashes compare before.json after.json
    python -m benchmarks.bundle_hashes compare before.json after.json --weights

Every shipped recipe is run on the demo checkpoint (with its calibration and without), on the golden
checkpoints of the tests, and on a random checkpoint with 0.5B's widths and few layers (both without
calibration): `quantize` once, and `export` once per target. Where a command refuses, its exit code and
message are recorded instead. Only the command line is used, so the script survives any change below it.
`record` completes a file that exists already. `compare --weights` looks only at weights and graphs, which
may change only when the numerics are meant to change.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import write_checkpoint
from fastvlm_convert.recipe import shipped_recipes

ROOT = Path(__file__).parent.parent
TARGETS = ("onnx", "coreml")
# Files that hold weights or graphs; the others describe them.
WEIGHTS = (".onnx", ".onnx_data", "weight.bin", ".safetensors")
LAYERS = 2  # of the random checkpoint's 24

Case = tuple[str, Path, list[str]]


def checkpoints(scratch: Path) -> dict[str, Path]:
    """Every checkpoint, by its name in the record."""
    wide = scratch / "wide"
    write_checkpoint(wide, "0.5b", LAYERS)
    golden = ROOT / "tests" / "data" / "golden"
    goldens = {path.name: path / "checkpoint" for path in sorted(golden.iterdir()) if path.is_dir()}
    return {"demo": ROOT / "checkpoints" / "fastvlm-demo", **goldens, "wide": wide}


def cases(paths: dict[str, Path]) -> Iterator[Case]:
    """Name, checkpoint and options of every run, without its output folder."""
    recipes = sorted(shipped_recipes())
    for name, path in paths.items():
        for recipe in recipes:
            for data in ("none", "default") if name == "demo" else ("none",):
                options = ["--recipe", recipe, *(["--calibration", "none"] if data == "none" else [])]
                yield f"{name} {recipe} {data} quantize", path, ["quantize", *options]
                for target in TARGETS:
                    yield f"{name} {recipe} {data} {target}", path, ["export", "--target", target, *options]


def run(case: Case, output: Path, cache: Path) -> dict[str, Any]:
    """Run one command; return the hashes of what it made, or how it refused."""
    _, checkpoint, (command, *options) = case
    call = [sys.executable, "-m", "fastvlm_convert", command, str(checkpoint), *options, "-o", str(output)]
    environment = {**os.environ, "FASTVLM_CONVERT_CACHE": str(cache)}
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:
        message = done.stderr.replace(str(checkpoint), "CHECKPOINT").replace(str(output), "OUTPUT")
        return {"exit_code": done.returncode, "message": " ".join(message.split())}
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {
        "exit_code": 0,
        "files": {
            p.relative_to(output).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        },
    }


def record(path: Path) -> None:
    """Run every case that the record lacks."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, case in enumerate(cases(checkpoints(folder))):
            if case[0] in known:
                continue
            output = folder / f"output{number}"
            known[case[0]] = run(case, output, folder / "cache")
            subprocess.run(["rm", "-rf", str(output)], check=True)
            path.write_text(json.dumps(known, indent=1) + "\n")
            print(f"{case[0]}: exit code {known[case[0]]['exit_code']}", flush=True)
    num_files = sum(len(entry.get("files", {})) for entry in known.values())
    print(f"{len(known)} commands, {num_files} hashes")


def differences(before: dict[str, Any], after: dict[str, Any], weights_only: bool) -> Iterator[str]:
    """One line for each difference."""
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            yield f"{name}: only in the {'second' if old is None else 'first'} record"
        elif old["exit_code"] != new["exit_code"]:
            yield f"{name}: exit code {old['exit_code']} -> {new['exit_code']}"
        elif not weights_only and old.get("message") != new.get("message"):
            yield f"{name}: {old['message']} -> {new['message']}"
        else:
            files, others = old.get("files", {}), new.get("files", {})
            for file in sorted({*files, *others}):
                judged = not weights_only or file.endswith(WEIGHTS)
                if judged and files.get(file) != others.get(file):
                    yield f"{name}: {file}"


def compare(before: Path, after: Path, weights_only: bool) -> int:
    """Print the differences; return the exit code."""
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    found = list(differences(old, new, weights_only))
    for line in found:
        print(line)
    files = [f for entry in old.values() for f in entry.get("files", {})]
    judged = [f for f in files if not weights_only or f.endswith(WEIGHTS)]
    print(f"{len(judged)} hashes of {len(old)} commands compared, {len(found)} differences")
    return 1 if found else 0


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run every case and write its hashes")
    recording.add_argument("file", type=Path)
    comparing = commands.add_parser("compare", help="compare two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--weights", action="store_true", help="weights and graphs alone")
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.file)
    else:
        raise SystemExit(compare(arguments.before, arguments.after, arguments.weights))


if __name__ == "__main__":
    main()
