"""Documents that other commands print, written down as their schemas have them."""

from typing import Any

SPREAD = {"p50": 80.0, "p90": 95.0, "p99": None, "min": 70.0, "max": 99.0}


def figure(metric: str, value: float, interval: tuple[float, float] | None = None) -> dict[str, Any]:
    """A score."""
    ends = None if interval is None else {"low": interval[0], "high": interval[1], "level": 0.95}
    reason = None if interval else "fewer than 30 pictures"
    return {"metric": metric, "value": value, "num_items": 40, "interval": ends, "reason": reason}


def model(name: str, *figures: object, differences: tuple[object, ...] = ()) -> dict[str, Any]:
    """How a model did."""
    facts = {"name": name, "path": name, "target": None, "sha256": "cd" * 32, "executed_by": "torch"}
    return {**facts, "num_cut": 0, "scores": list(figures), "differences": list(differences)}


def evaluation() -> dict[str, Any]:
    """What `evaluate --json` prints."""
    difference = figure("exact_match", -0.05, (-0.1, 0.0))
    return {
        "schema_version": 1,
        "command": "evaluate",
        "dataset": {"name": "demo", "metric": "exact_match", "num_items": 40, "num_pictures": 31},
        "models": [
            model("checkpoint", figure("exact_match", 0.9, (0.8, 0.95))),
            model("int4", figure("exact_match", 0.85), differences=(difference,)),
        ],
        "num_differing": 2,
        "warnings": ["mind this"],
        "items": [],
    }


def bench() -> dict[str, Any]:
    """What `bench --json` prints, figures of a phone among them."""
    contenders = [
        {
            "name": name, "executed_by": "torch", "imported_from": imported, "measured_on": "iPhone 16",
            "load_ms": None, "peak_memory_bytes": None, "ratio_to_reference": ratios,
            "ratio_interval": {key: {"low": 0.7, "high": 0.9, "level": 0.95} for key in ratios},
            "metrics": {"ttft_ms": SPREAD, "decode_tokens_per_s": {**SPREAD, "p90": 72.0}},
        }
        for name, imported, ratios in (("reference", None, {}), ("app", "xcode", {"ttft_ms": 0.8}))
    ]  # fmt: skip
    return {
        "schema_version": 1,
        "command": "bench",
        "machine": {"cpu": "a processor", "cores": 2, "os": "Linux"},
        "settings": {"trials": 30, "new_tokens": 32},
        "contenders": contenders,
        "notes": ["be careful"],
    }
