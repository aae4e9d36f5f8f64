"""Answer on a Mac what Linux cannot: does real Core ML load and run the packages, and does it agree?

    python scripts/check_on_mac.py record BUNDLE RECORD.npz     # any machine: what the interpreter computes
    python scripts/check_on_mac.py compare BUNDLE RECORD.npz    # a Mac: what Core ML computes, as JSON

`compare` loads every package with Core ML, and runs the recorded inputs through vision, embedding, prefill
(in several chunks) and decode, which share one state. It prints one JSON document: the signal to noise of
each stage against the interpreter, or the error with which Core ML refused. Exit codes: 0, everything ran and
agrees to 40 dB; 1, something did not; 2, this is not a Mac.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.metrics import max_abs_error, sqnr_db
from fastvlm_convert.runtime.core_ml import has_core_ml
from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.session import Session

MIN_SQNR_DB = 40
NUM_DECODE_STEPS = 8


def inputs(session: Session, image_size: int, prefill_chunk: int) -> dict[str, np.ndarray]:
    """Inputs, the same everywhere: a picture of 8-bit noise, and token ids for a prompt of three chunks."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 3, image_size, image_size)).astype(np.float32) / np.float32(255)
    length = min(2 * prefill_chunk + prefill_chunk // 2, session.context_length - NUM_DECODE_STEPS)
    return {
        "pixels": pixels,
        "ids": rng.integers(0, 200, length),
        "next": rng.integers(0, 200, NUM_DECODE_STEPS),
    }


def stages(session: Session, given: dict[str, np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
    """What is run, in this order: later stages use the state of earlier ones."""

    def decode() -> np.ndarray:
        return np.stack(
            [session.decode(session.embed(given["next"][i : i + 1])) for i in range(NUM_DECODE_STEPS)]
        )

    return {
        "image_features": lambda: session.encode_image(given["pixels"]),
        "inputs_embeds": lambda: session.embed(given["ids"]),
        "prefill_logits": lambda: session.prefill(session.embed(given["ids"])),
        "decode_logits": decode,
    }


def record(bundle: Path, path: Path) -> int:
    """Save inputs, and what the interpreter computes from them when it rounds as a device may."""
    manifest = load_manifest(bundle)
    session = load_bundle(bundle, "coreml", "device").session
    given = inputs(session, manifest.contract.image_size, manifest.recipe.coreml.prefill_chunk)
    np.savez(path, **given, **{f"out_{name}": run() for name, run in stages(session, given).items()})
    return 0


def compare(bundle: Path, path: Path) -> int:
    """Run Core ML on the recorded inputs and print the report."""
    if not has_core_ml():
        print(json.dumps({"status": "not_run", "reason": f"no Core ML on {platform.system()}"}))
        return 2
    recorded = dict(np.load(path))
    report: dict[str, Any] = {"macos": platform.mac_ver()[0], "machine": platform.machine(), "stages": {}}
    try:
        session = load_bundle(bundle, "coreml").session
        for name, run in stages(session, recorded).items():
            expected, found = recorded[f"out_{name}"], run()
            value = sqnr_db(expected, found)
            passed = value is None or value >= MIN_SQNR_DB
            report["stages"][name] = {
                "status": "passed" if passed else "failed",
                "sqnr_db": value,
                "max_abs_error": max_abs_error(expected, found),
            }
    except Exception as error:  # noqa: BLE001  whatever Core ML raises is the answer this script is for
        report["error"] = f"{type(error).__name__}: {error}"
    failed = "error" in report or any(s["status"] == "failed" for s in report["stages"].values())
    report["status"] = "failed" if failed else "passed"
    print(json.dumps(report, indent=2))
    return int(failed)


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("record", type=Path)
    arguments = parser.parse_args()
    return {"record": record, "compare": compare}[arguments.action](arguments.bundle, arguments.record)


if __name__ == "__main__":
    sys.exit(main())
