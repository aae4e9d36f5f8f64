"""The engine that the settings ask for."""

import os

from fastvlm_convert.bench.machine import usable_cpus
from fastvlm_convert.prompt_cache import PromptCache
from fastvlm_convert.serve.engine import Engine
from fastvlm_convert.serve.engines.embedded import EmbeddedEngine
from fastvlm_convert.serve.served_bundle import ServedBundle
from fastvlm_convert.serve.settings import Settings


def make_engine(bundle: ServedBundle, settings: Settings, cache: PromptCache | None) -> Engine:
    """An engine for a bundle, not started yet."""
    return EmbeddedEngine(bundle, settings.slots, threads_of(bundle, settings), cache)


def threads_of(bundle: ServedBundle, settings: Settings) -> int | None:
    """Threads of one question: as set, else an equal share of the cores; None where the runtime decides."""
    if settings.threads is not None or bundle.target != "onnx" or os.environ.get("OMP_NUM_THREADS"):
        return settings.threads
    return max(1, len(usable_cpus()) // settings.slots)
