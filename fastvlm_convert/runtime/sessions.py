"""Which module runs the artifacts of each target."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final

from fastvlm_convert.errors import MissingDependencyError
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.io_names import Precision
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.runtime.threads import DEFAULT_THREADS, Threads
from fastvlm_convert.session import Session
from fastvlm_convert.targets import Target

OpenSession = Callable[[Path, Manifest, Precision | None, Threads, bool], Session]

# Module that has `open_session`; it is imported late, because the runtimes take seconds.
SESSIONS: Final[dict[Target, str]] = {
    "onnx": "fastvlm_convert.runtime.onnx_session",
    "coreml": "fastvlm_convert.runtime.coreml_session",
    "mlx": "fastvlm_convert.runtime.mlx_session",
}


def open_session(
    bundle: Path,
    manifest: Manifest,
    target: Target,
    precision: Precision | None,
    threads: Threads = DEFAULT_THREADS,
    in_turn: bool = False,
) -> Session:
    """Run one target of a bundle.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        target: One that the bundle has.
        precision: How exactly, where the runtime leaves a choice (see `runtime.loaded.load_bundle`).
        threads: How many compute one operation, where the runtime leaves a choice.
        in_turn: Load encoder and decoder one after the other, where the runtime loads them whole.

    Raises:
        BundleError: The runtime refuses the bundle.
        MissingDependencyError: The runtime is not installed.
    """
    title = backend_of(target).title
    try:
        module = import_module(SESSIONS[target])
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, f"running {title} bundles") from error
    open_one: OpenSession = module.open_session
    return open_one(bundle, manifest, precision, threads, in_turn)
