"""What every request passes before anything reads it: an id, the phase of the server, the limits."""

import re
import secrets
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvlm_convert.serve.errors import RequestError, UnavailableError
from fastvlm_convert.serve.replies import error_response
from fastvlm_convert.serve.service import Service

ID_HEADER: Final = "x-request-id"
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_API: Final = "/v1/"


class Gate:
    """ASGI middleware; not Starlette's `BaseHTTPMiddleware`, which hides that a client left.

    Args:
        app: What comes behind it.
        service: The server's.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(ID_HEADER, "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[ID_HEADER] = request_id
            await send(message)

        if not scope["path"].startswith(_API):
            await self._app(scope, receive, send_with_id)
            return
        lifecycle = self._service.lifecycle
        lifecycle.took()
        try:
            self._check_phase()
            await self._app(scope, receive, send_with_id)
        except RequestError as error:
            await error_response(error)(scope, receive, send_with_id)
        finally:
            lifecycle.gave()

    def _check_phase(self) -> None:
        phase = self._service.lifecycle.phase
        if phase == "ready":
            return
        if phase == "draining":
            seconds = self._service.settings.drain_seconds
            raise UnavailableError("the server is shutting down", code="draining", retry_after_s=seconds)
        raise UnavailableError("the bundles are being loaded", code="loading", retry_after_s=2.0)
