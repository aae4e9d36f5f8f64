"""The engine that the settings ask for."""

import os

from fastvlm_convert.serve.engine import Engine
from fastvlm_convert.serve.engines.embedded import EmbeddedEngine
from fastvlm_convert.serve.served_bundle import ServedBundle
from fastvlm_convert.serve.settings import Settings


def make_engine(bundle: ServedBundle, settings: Settings) -> Engine:
    """An engine for a bundle, not started yet."""
    return EmbeddedEngine(bundle, settings.slots, threads_of(bundle, settings))


def threads_of(bundle: ServedBundle, settings: Settings) -> int | None:
    """Threads of one question: as set, else an equal share of the cores; None where the runtime decides."""
    if settings.threads is not None or bundle.target != "onnx" or os.environ.get("OMP_NUM_THREADS"):
        return settings.threads
    return max(1, len(os.sched_getaffinity(0)) // settings.slots)
