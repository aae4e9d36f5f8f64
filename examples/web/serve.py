"""Serve this page and a bundle on this machine: `python examples/web/serve.py BUNDLE`.

Any static server will do. This one also sends the headers that let WebAssembly use several threads, says
the sizes of files, and gives every bundle an address of its own, so that a browser never mixes what it has
stored of one bundle with another.
"""

import argparse
import hashlib
import json
import re
import sys
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

PAGE = Path(__file__).parent
MANIFEST = "fastvlm_manifest.json"


def model_name(bundle: Path) -> str:
    """The bundle's folder in addresses: its name, and what tells its content."""
    digest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', bundle.name)}-{digest[:12]}"


class Handler(SimpleHTTPRequestHandler):
    """Files of the page, of the bundle, and of libraries that npm installed."""

    # One connection serves many files. HTTP/1.0 takes a new one for each, and a browser does not ask again
    # where a new one breaks; where one that it has used before does, it does.
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits until the browser has acknowledged the headers
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args: object, bundle: Path, libraries: Path | None, **kwargs: object) -> None:
        """See `make_server`."""
        self._folders = {f"/{model_name(bundle)}/": bundle}
        self._settings = json.loads((PAGE / "settings.json").read_text())
        self._settings["model"] = model_name(bundle)
        if libraries:
            self._folders["/libraries/"] = libraries
            self._settings["library"] = "libraries/@huggingface/transformers/dist/transformers.min.js"
            self._settings["runtime"] = "libraries/onnxruntime-web/dist/"
        super().__init__(*args, directory=str(PAGE), **kwargs)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        """The file that an address means; the base class removes what would lead out of the folder."""
        for prefix, folder in self._folders.items():
            if path.startswith(prefix):
                self.directory = str(folder)
                return super().translate_path("/" + path.removeprefix(prefix))
        self.directory = str(PAGE)
        return super().translate_path(path)

    def end_headers(self) -> None:
        """Isolate the page, which threads need, and let the browser ask whether a file has changed."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def do_GET(self) -> None:
        """Settings, the first bytes of a file, or a file."""
        if self.path == "/settings.json":
            self._send(json.dumps(self._settings).encode(), "application/json")
        elif self.headers.get("Range") == "bytes=0-0":  # how transformers.js asks for a file's size
            self._send_first_byte()
        else:
            super().do_GET()

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_first_byte(self) -> None:
        path = Path(self.translate_path(self.path.partition("?")[0]))
        if not path.is_file() or not path.stat().st_size:
            self.send_error(404)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 0-0/{path.stat().st_size}")
        self.send_header("Content-Length", "1")
        self.end_headers()
        with path.open("rb") as file:
            self.wfile.write(file.read(1))

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:  # type: ignore[override]
        """Send a file; a browser that goes away in the middle is no error."""
        try:
            super().copyfile(source, outputfile)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Errors are worth a line, files are not."""


class Server(ThreadingHTTPServer):
    """Takes what a browser with several pages and workers opens at once, on a busy machine too."""

    request_queue_size = 128  # of connections that wait to be accepted; socketserver's 5 drops the others


def make_server(bundle: Path, libraries: Path | None = None, port: int = 8000) -> Server:
    """A server that listens on this machine only.

    Args:
        bundle: A folder that `fastvlm-convert export` made.
        libraries: A folder `node_modules` that has transformers.js and onnxruntime-web; without it, the
            browser gets them from the addresses in settings.json.
        port: 0 takes a free one.

    Raises:
        FileNotFoundError: The bundle has no manifest.
    """
    model_name(bundle)
    return Server(("127.0.0.1", port), partial(Handler, bundle=bundle, libraries=libraries))


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, help="a folder that `fastvlm-convert export` made")
    parser.add_argument("--libraries", type=Path, help="a folder node_modules to take transformers.js from")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    if not (given.bundle / MANIFEST).is_file():
        sys.exit(f"error: {given.bundle} is no bundle: it has no {MANIFEST}")
    if given.libraries and not (given.libraries / "@huggingface" / "transformers").is_dir():
        sys.exit(
            f"error: {given.libraries} has no @huggingface/transformers\n  hint: `make clients` installs it"
        )
    with make_server(given.bundle, given.libraries, given.port) as server:
        print(f"http://localhost:{server.server_port}  (Ctrl-C ends)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
