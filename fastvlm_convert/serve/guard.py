"""Who may ask, how often and how much; and what is noted of those who try more."""

from collections.abc import Callable, Collection, Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fastvlm_convert.serve.accounting import Account
from fastvlm_convert.serve.body import BodyLimit, body_limit
from fastvlm_convert.serve.errors import RequestError
from fastvlm_convert.serve.incidents import Action, IncidentLog
from fastvlm_convert.serve.keys import ApiKeys, check_exposure
from fastvlm_convert.serve.limits import Bans, RateLimiter, Strikes, client_address
from fastvlm_convert.serve.metrics import Metrics
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.serve.threats import REPEATED_REJECTS, blocked, finding_of, scan
from fastvlm_convert.serve.validate import sha256_of

PROBES: Final = ("/livez", "/readyz")
"""Paths that never need a key: those that orchestrators ask, which say nothing but whether it works."""

_API: Final = "/v1/"
_REJECTS: Final = (400, 401, 413, 415, 422)


class Security:
    """Keys, rates, bans and incidents of a server.

    Attributes:
        incidents: The log.
    """

    def __init__(self, settings: Settings, metrics: Metrics, hash_client: Callable[[str], str]) -> None:
        """Read the keys and open the log.

        Args:
            settings: The server's; with `security_enabled` false, keys and checks of requests remain.
            metrics: Count incidents.
            hash_client: Names clients in the log.

        Raises:
            SettingsError: Keys are needed and there are none, or a file cannot be used.
        """
        self._settings, self._metrics = settings, metrics
        self._keys = None if settings.api_key_file is None else ApiKeys.read(settings.api_key_file)
        check_exposure(settings.host, settings.env, self._keys is not None)
        self._is_on = settings.security_enabled
        self._rates = RateLimiter(settings.rate_limit_per_minute if self._is_on else 0)
        self._bans = Bans(settings.ban_after, settings.ban_seconds)
        self._strikes = Strikes()
        self.incidents = IncidentLog(settings.incident_log if self._is_on else None, hash_client)

    def admit(self, scope: Scope, account: Account, is_public: bool) -> None:
        """See who sends a request, and whether it may.

        Args:
            scope: The request's.
            account: Gets the client's id: of its key, or else its address.
            is_public: Whether the path needs no key.

        Raises:
            RateLimitedError: The client is banned, or asks too often.
            UnauthorizedError: It has no key, or not a known one.
        """
        headers = Headers(scope=scope)
        peer = scope["client"][0] if scope.get("client") else None
        trusted = self._settings.trusted_proxies
        account.client = client_address(peer, headers.getlist("x-forwarded-for"), trusted)
        if is_public:
            return
        self._bans.check(account.client)
        if self._keys is not None:
            given = headers.getlist("authorization")
            account.client = self._keys.check(given[0] if len(given) == 1 else None)
            self._bans.check(account.client)
        if scope["path"].startswith(_API):
            self._rates.check(account.client)

    def scan(self, texts: Sequence[str], account: Account) -> None:
        """Look for threats in the texts of a request.

        Raises:
            InvalidRequestError: There are some, and they are blocked.
        """
        if not self._is_on:
            return
        evidence = [sha256_of(text) for text in texts]
        findings = scan(texts)
        action: Action = self._settings.threat_action
        for finding in findings:
            self._note(finding.rule, action, account, evidence)
        if findings and action == "block":
            raise blocked(findings)

    def refused(self, error: RequestError, account: Account) -> None:
        """Note a refusal, which is an incident if a rule says so, or if the client has had too many."""
        if not self._is_on or error.status not in _REJECTS:
            return
        finding = finding_of(error)
        if finding is not None:
            self._note(finding.rule, "reject", account, error.evidence)
        if self._strikes.strike(account.client):
            self._note(REPEATED_REJECTS, "record", account, ())

    def _note(self, rule: str, action: Action, account: Account, evidence: Sequence[str]) -> None:
        self._write(rule, action, account, evidence)
        if self._bans.strike(account.client):
            self._write(rule, "ban", account, evidence)

    def _write(self, rule: str, action: Action, account: Account, evidence: Sequence[str]) -> None:
        self._metrics.incident(rule, action)
        self.incidents.record(
            rule, action, client=account.client, request_id=account.request_id, evidence=evidence
        )


class Guard:
    """ASGI middleware behind the gate, before anything reads a request's body.

    Args:
        app: What comes behind it.
        security: The server's.
        settings: Limits of bodies.
        public: Paths that need no key besides `PROBES`: the page's static files.
    """

    def __init__(
        self, app: ASGIApp, security: Security, settings: Settings, public: Collection[str] = ()
    ) -> None:
        self._limited = BodyLimit(app, body_limit(settings), seconds=settings.timeout_seconds)
        self._security = security
        self._public = frozenset((*PROBES, *public))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through.

        Raises:
            RequestError: It is refused.
        """
        if scope["type"] != "http":
            await self._limited(scope, receive, send)
            return
        account: Account = scope["state"]["account"]
        try:
            self._security.admit(scope, account, scope["path"] in self._public)
            await self._limited(scope, receive, send)
        except RequestError as error:
            self._security.refused(error, account)
            raise
        if account.error is not None:
            self._security.refused(account.error, account)
