"""The paths of the server."""

from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from fastvlm_convert.serve.chat import Chat
from fastvlm_convert.serve.health import HealthDocument, health_document
from fastvlm_convert.serve.schema import ChatCompletion, ErrorReply, ModelCard, ModelList
from fastvlm_convert.serve.service import Service

_ERRORS: Final[dict[int, str]] = {
    400: "The request is malformed, or asks for what is not offered.",
    401: "There is no key, or not a known one.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body or a picture is too large.",
    415: "The body is no JSON, or a picture is of a format that is not taken.",
    422: "A picture cannot be decoded.",
    429: "Too many requests of one client; see Retry-After.",
    500: "The bundle's runtime raised an error.",
    503: "Not now; see Retry-After.",
    504: "The answer was not there in time.",
}
_REQUEST: Final = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    }
}
_STREAM: Final = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
_METRICS: Final = {"content": {"text/plain": {"schema": {"type": "string"}}}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": _ERRORS[status], "model": ErrorReply} for status in statuses}


def make_router(service: Service) -> APIRouter:
    """The routes of a service."""
    router = APIRouter()
    chat = Chat(service)

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: _STREAM, **_errors(*_ERRORS)},
        openapi_extra=_REQUEST,
    )
    async def chat_completions(request: Request) -> Response:
        """Answer the last message of a conversation."""
        return await chat.answer(request)

    @router.get("/v1/models", responses=_errors(401, 429, 503))
    async def models() -> ModelList:
        """The bundles that are served."""
        return ModelList(data=[_card(service, name) for name in service.router.models])

    @router.get("/v1/models/{name:path}", responses=_errors(401, 404, 429, 503))
    async def model(name: str) -> ModelCard:
        """A bundle that is served."""
        service.router.choose(name, "")
        return _card(service, name)

    _add_probes(router, service)
    return router


def _add_probes(router: APIRouter, service: Service) -> None:
    # Load balancers and `wget --spider` probe with HEAD, which FastAPI does not add by itself.
    @router.head("/livez", include_in_schema=False)
    @router.get("/livez")
    async def livez() -> dict[str, str]:
        """Whether the server's process is alive."""
        return {"status": "alive"}

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses={503: {"description": "Loading, unable to, or about to end."}})
    async def readyz() -> Response:
        """Whether questions can be asked."""
        status = service.readiness
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @router.get("/health", responses=_errors(401))
    async def health() -> HealthDocument:
        """How the server is."""
        return health_document(service.state())

    @router.get("/metrics", response_class=Response, responses={200: _METRICS, **_errors(401)})
    async def metrics() -> Response:
        """Counters and gauges for Prometheus."""
        return Response(service.rendered_metrics(), media_type=service.metrics.content_type)


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(id=name, created=int(service.started_at))
