"""The server as an ASGI application."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from fastvlm_convert import __version__
from fastvlm_convert.serve.errors import EngineFailedError, InvalidRequestError, NotFoundError, RequestError
from fastvlm_convert.serve.gate import ID_HEADER, Gate
from fastvlm_convert.serve.guard import Guard
from fastvlm_convert.serve.page import PATHS, add_page
from fastvlm_convert.serve.replies import error_response
from fastvlm_convert.serve.routes import make_router
from fastvlm_convert.serve.schema import ChatRequest
from fastvlm_convert.serve.service import Service

_LOG: Final = logging.getLogger(__name__)


def make_app(service: Service, on_loaded: Callable[[], None] = lambda: None) -> FastAPI:
    """The application of a service; it loads the bundles when it starts, and listens while it does.

    Args:
        service: What it serves.
        on_loaded: Called when the bundles are loaded, or cannot be (`service.lifecycle.failure`).
    """

    def loaded(loading: "asyncio.Task[None]") -> None:
        if loading.cancelled():
            return
        # Whatever it is, a bug of ours, too: a server that loads for ever would be taken for a slow one.
        service.lifecycle.failure = loading.exception()
        if service.lifecycle.failure is None and service.lifecycle.phase == "loading":
            service.lifecycle.phase = "ready"
        on_loaded()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.get_running_loop().create_task(service.load())
        loading.add_done_callback(loaded)
        yield
        loading.cancel()
        await service.close()

    hides_docs = service.settings.env == "production"
    app = FastAPI(
        title="fastvlm-convert serve",
        version=__version__,
        description="Ask bundles about pictures; the answers are those of `fastvlm-convert run`.",
        docs_url=None if hides_docs else "/docs",
        redoc_url=None,
        lifespan=lifespan,
        # FastAPI's own, which sends messages of exceptions; ours is `traces`.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    app.include_router(make_router(service))
    add_page(app)
    service.accounts.traces.instrument(app)
    app.add_middleware(Guard, security=service.security, settings=service.settings, public=PATHS)
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _mistake)  # which is then raised again, for the log
    _describe_requests(app)
    return app


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    request.state.account.error = error
    return error_response(error)


async def _mistake(request: Request, _: Exception) -> Response:
    """A bug of ours, of whose message nothing is told; the gate has noted the request's end already."""
    response = error_response(EngineFailedError("the server made a mistake; its log has it", code="internal"))
    response.headers[ID_HEADER] = request.state.account.request_id
    response.headers["connection"] = "close"  # as uvicorn does, without a word, when it logs the bug
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths, and methods that a path does not have."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFoundError(f"there is nothing at {request.url.path}", code="not_found"))
    refusal = InvalidRequestError(str(error.detail), code="method_not_allowed")
    response = error_response(refusal)
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


def _describe_requests(app: FastAPI) -> None:
    """Add the request's schema to the OpenAPI document: the body is read by `schema.read_request`."""
    describe = app.openapi

    def openapi() -> dict[str, object]:
        document = describe()
        schemas = document["components"]["schemas"]
        if "ChatRequest" not in schemas:
            schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs")
            schemas["ChatRequest"] = schema
        return document

    app.openapi = openapi  # type: ignore[method-assign]
