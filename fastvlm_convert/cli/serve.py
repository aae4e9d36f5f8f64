"""`fastvlm-convert serve`: answer questions about pictures over HTTP."""

import faulthandler
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fastvlm_convert.cli.answering import BundleTargetOption
from fastvlm_convert.cli.console import err, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.serve_settings import show_settings as print_settings
from fastvlm_convert.errors import MissingDependencyError, UsageError
from fastvlm_convert.targets import known_target

if TYPE_CHECKING:
    from fastvlm_convert.serve.settings import Settings

EXAMPLES = """
fastvlm-convert serve app
fastvlm-convert serve a=app-int4 b=app-int8 --weight a=90 --weight b=10
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
WeightOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weight",
        metavar="NAME=WEIGHT",
        help="Share of the clients that a bundle gets of those who name none; equal shares if omitted.",
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
ShowSettingsOption = Annotated[
    bool, typer.Option("--show-settings", help="Print every setting and where it is from, and end.")
]


@dataclass(frozen=True)
class ServeDocument(Document, name="serve"):
    """A server that can be asked; printed once it is ready, and it runs on.

    Attributes:
        url: Where, without a path.
        models: Names that requests may give.
        seconds: From the start until it was ready.
    """

    url: str
    models: tuple[str, ...]
    seconds: float


def command(
    context: typer.Context,
    bundles: BundlesArgument = None,
    host: HostOption = None,
    port: PortOption = None,
    target: BundleTargetOption = None,
    engine: EngineOption = None,
    weight: WeightOption = None,
    settings: SettingsOption = None,
    show_settings: ShowSettingsOption = False,
) -> None:
    """Answer questions about images over HTTP.

    The API is OpenAI's (/v1/chat/completions), and the answers are those of `run`, bit for bit. Ctrl-C or
    SIGTERM lets the server finish what it was asked; a second one ends it at once.
    """
    began = time.monotonic()
    try:
        from fastvlm_convert.serve.settings_sources import load_settings
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "`serve`") from error
    loaded = load_settings({"host": host, "port": port, "engine": engine}, settings)
    if show_settings:
        print_settings(context, loaded)
        return
    if not bundles:
        raise UsageError("missing argument 'BUNDLE'", hint="`fastvlm-convert export` makes one")
    _serve(context, loaded.settings, bundles, weight or [], target, began)


def _serve(
    context: typer.Context,
    settings: "Settings",
    bundles: list[str],
    weights: list[str],
    target: str | None,
    began: float,
) -> None:
    """Serve until a signal.

    Args:
        context: The command's.
        settings: The server's.
        bundles: `PATH` or `NAME=PATH` each.
        weights: `NAME=NUMBER` each.
        target: Which of the bundles' formats is run.
        began: When the command did, on `time.monotonic()`.
    """
    try:
        from fastvlm_convert.serve.engines.choice import make_engine
        from fastvlm_convert.serve.logs import set_up_logs
        from fastvlm_convert.serve.router import parse_bundle, parse_weights
        from fastvlm_convert.serve.served_bundle import open_served_bundle
        from fastvlm_convert.serve.server import listen, run_server
        from fastvlm_convert.serve.service import make_service
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "`serve`") from error
    chosen = None if target is None else known_target(target)
    named = [parse_bundle(argument) for argument in bundles]
    served = [open_served_bundle(path, name, chosen) for name, path in named]
    service = make_service(settings, served, make_engine, parse_weights(weights))
    flags = flags_of(context)

    def on_ready() -> None:
        seconds = round(time.monotonic() - began, 3)
        document = ServeDocument(url, service.router.models, seconds)
        report(context, "passed", document, lambda: err.print(_greeting(document), highlight=False), url)
        sys.stdout.flush()  # a program may wait for it

    with listen(settings.host, settings.port) as sock:
        url = f"http://{_shown_host(settings.host)}:{sock.getsockname()[1]}"
        level = logging.ERROR if flags.is_silent else logging.INFO
        set_up_logs(settings.log_format, sys.stderr, level)
        if sys.__stderr__ is not None:  # a runtime that crashes, or whose mapped weights are cut off, says so
            faulthandler.enable(sys.__stderr__)
        run_server(service, sock, on_ready)


def _greeting(document: ServeDocument) -> str:
    names = ", ".join(document.models)
    return f"serving {escape(names)} at {document.url} (ready in {document.seconds:.1f} s)"


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
