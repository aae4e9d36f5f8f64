"""The engine that the settings ask for."""

import os

from fastvlm_convert.processors import usable_cpus
from fastvlm_convert.prompt_cache import PromptCache
from fastvlm_convert.serve.engine import Engine
from fastvlm_convert.serve.engines.embedded import EmbeddedEngine
from fastvlm_convert.serve.engines.processes import ProcessesEngine, Workers
from fastvlm_convert.serve.engines.ray import make_ray_engine
from fastvlm_convert.serve.served_bundle import ServedBundle
from fastvlm_convert.serve.settings import Settings


def make_engine(bundle: ServedBundle, settings: Settings, cache: PromptCache | None) -> Engine:
    """An engine for a bundle, not started yet."""
    if settings.engine == "ray":
        return make_ray_engine(bundle, settings)
    if settings.engine == "processes":
        return ProcessesEngine(bundle, _workers(bundle, settings))
    return EmbeddedEngine(bundle, settings.slots, threads_of(bundle, settings, settings.slots), cache)


def _workers(bundle: ServedBundle, settings: Settings) -> Workers:
    """What the settings say of workers that are processes; each has one question at a time."""
    megabytes = 1_000_000 if settings.cache_enabled else 0
    return Workers(
        min_workers=settings.min_workers,
        max_workers=settings.max_workers,
        threads=threads_of(bundle, settings, settings.max_workers),
        feature_cache_bytes=int(settings.feature_cache_mb * megabytes),
        prefix_cache_bytes=int(settings.prefix_cache_mb * megabytes),
    )


def threads_of(bundle: ServedBundle, settings: Settings, at_once: int) -> int | None:
    """Threads of one question: as set, else an equal share of the cores; None where the runtime decides.

    Args:
        bundle: What is run.
        settings: The server's.
        at_once: Questions that run at the same time.
    """
    if settings.threads is not None or bundle.target != "onnx" or os.environ.get("OMP_NUM_THREADS"):
        return settings.threads
    return max(1, len(usable_cpus()) // at_once)
