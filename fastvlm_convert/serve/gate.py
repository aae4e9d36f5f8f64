"""What every request passes before anything reads it, and where its end is noted."""

import re
import secrets
import time
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvlm_convert.serve.accounting import Account
from fastvlm_convert.serve.errors import RequestError, UnavailableError
from fastvlm_convert.serve.replies import error_response
from fastvlm_convert.serve.service import Service

ID_HEADER: Final = "x-request-id"
QUESTIONS: Final = "/v1/chat/completions"
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_API: Final = "/v1/"
_QUIET: Final = ("/livez", "/readyz", "/health", "/metrics")  # asked for every few seconds, by machines
_LOADING_S: Final = 2.0


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
        account = _account(scope)
        scope.setdefault("state", {})["account"] = account

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.code = message["status"]
                MutableHeaders(scope=message)[ID_HEADER] = account.request_id
            await send(message)

        lifecycle = self._service.lifecycle
        is_api = scope["path"].startswith(_API)
        if is_api:
            lifecycle.took()
        try:
            if is_api:
                self._check_phase()
            await self._app(scope, receive, send_with_id)
        except RequestError as error:
            account.error = error
            await error_response(error)(scope, receive, send_with_id)
        finally:
            if is_api:
                lifecycle.gave()
            self._note(scope, account)

    def _check_phase(self) -> None:
        phase = self._service.lifecycle.phase
        if phase == "draining":
            seconds = self._service.settings.drain_seconds
            raise UnavailableError("the server is shutting down", code="draining", retry_after_s=seconds)
        if phase == "loading":
            raise UnavailableError("the bundles are being loaded", code="loading", retry_after_s=_LOADING_S)

    def _note(self, scope: Scope, account: Account) -> None:
        route = scope.get("route")
        account.route = getattr(route, "path", account.route)
        if scope["path"] == QUESTIONS:
            self._service.accounts.ended(account)
        if scope["path"] not in _QUIET:
            self._service.accounts.logged(account)


def _account(scope: Scope) -> Account:
    given = Headers(scope=scope).get(ID_HEADER, "")
    address = scope["client"][0] if scope.get("client") else ""
    return Account(
        request_id=given if _ID.fullmatch(given) else secrets.token_hex(16),
        client=address,
        route="other",
        began=time.monotonic(),
    )
