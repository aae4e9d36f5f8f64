"""`fastvlm-convert serve`: answer questions about pictures over HTTP."""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_convert.cli.answering import BundleTargetOption
from fastvlm_convert.cli.console import err
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.errors import MissingDependencyError, UsageError
from fastvlm_convert.targets import Target, known_target

if TYPE_CHECKING:
    from fastvlm_convert.serve.served_bundle import ServedBundle

EXAMPLES = """
fastvlm-convert serve app
fastvlm-convert serve small=app-int4 large=app-int8 --port 9000
"""

BundlesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="BUNDLE...",
        help="Folders of bundles, or NAME=FOLDER to name them in requests.",
        show_default=False,
    ),
]
HostOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Address to listen on; 127.0.0.1 if omitted.", show_default=False),
]
PortOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, metavar="N", help="Port; 8000 if omitted, 0 takes a free one.", show_default=False
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        metavar="embedded|processes|ray",
        help="Who runs the bundles; embedded if omitted.",
        show_default=False,
    ),
]
SettingsOption = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        metavar="FILE.yaml",
        help="File with settings; see configs/serve.yaml.",
        show_default=False,
    ),
]


def command(
    context: typer.Context,
    bundles: BundlesArgument = None,
    host: HostOption = None,
    port: PortOption = None,
    target: BundleTargetOption = None,
    engine: EngineOption = None,
    settings: SettingsOption = None,
) -> None:
    """Answer questions about pictures over HTTP, in the form of OpenAI's API.

    The answers are those of `run`, bit for bit. Ctrl-C or SIGTERM finishes what was asked and ends.
    """
    began = time.monotonic()
    flags = flags_of(context)
    try:
        from fastvlm_convert.serve.engines.choice import make_engine
        from fastvlm_convert.serve.logs import set_up_logs
        from fastvlm_convert.serve.server import listen, run_server
        from fastvlm_convert.serve.service import make_service
        from fastvlm_convert.serve.settings_sources import load_settings
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "`serve`") from error
    loaded = load_settings({"host": host, "port": port, "engine": engine}, settings).settings
    served = _open_bundles(bundles or [], None if target is None else known_target(target))
    set_up_logs(loaded.log_format, sys.stderr, logging.ERROR if flags.is_silent else logging.INFO)
    sock = listen(loaded.host, loaded.port)
    service = make_service(loaded, served, make_engine)

    def on_ready() -> None:
        if not flags.is_silent:
            where = f"http://{loaded.host}:{sock.getsockname()[1]}"
            err.print(
                f"serving {', '.join(service.bundles)} at {where} (ready in {time.monotonic() - began:.1f} s)"
            )

    with sock:
        run_server(service, sock, on_ready)


def _open_bundles(arguments: list[str], target: Target | None) -> "list[ServedBundle]":
    """The bundles of a command line.

    Raises:
        UsageError: There is none, or two have one name.
        BundleError: One is no bundle.
    """
    from fastvlm_convert.serve.served_bundle import open_served_bundle

    if not arguments:
        raise UsageError("missing argument 'BUNDLE'", hint="`fastvlm-convert export` makes one")
    opened = []
    for argument in arguments:
        name, is_named, path = argument.rpartition("=")
        folder = Path(path if is_named and not Path(argument).exists() else argument)
        opened.append(open_served_bundle(folder, name if folder != Path(argument) else None, target))
    names = [bundle.name for bundle in opened]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two bundles are called {twice[0]!r}", hint="name them: NAME=FOLDER")
    return opened
