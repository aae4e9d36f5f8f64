"""API keys: who may ask, and where no key is needed.

Keys are compared by their hashes, all of them every time, so that the time of an answer tells nothing.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import re
from pathlib import Path
from typing import Final

from fastvlm_convert.errors import SettingsError, printable, shortened
from fastvlm_convert.regular_file import read_text
from fastvlm_convert.serve.errors import UnauthorizedError

MIN_KEY_CHARS: Final = 16

_MAX_FILE_BYTES: Final = 1 << 20
_OTHERS_READ: Final = 0o004
_OTHERS_WRITE: Final = 0o002
_LOG: Final = logging.getLogger(__name__)
_KEY: Final = re.compile(r"[!-9;-~]{1,512}")  # printable ASCII without spaces and colons
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HINT: Final = "one key a line, or name:key; make one with `openssl rand -hex 24`"


class ApiKeys:
    """The keys of a server."""

    def __init__(self, keys: dict[str, str]) -> None:
        """Remember hashes.

        Args:
            keys: Keys by the names of their clients.
        """
        self._digests = {name: _digest(key) for name, key in keys.items()}

    @classmethod
    def read(cls, path: Path) -> "ApiKeys":
        """Read a file with a key a line, `KEY` or `NAME:KEY`; lines that begin with # are comments.

        Raises:
            SettingsError: It cannot be read, everybody can write it, it has no key, one that is too short or
                has other characters than printable ASCII, or one twice.
        """
        try:
            text = read_text(path, _MAX_FILE_BYTES)
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise _refusal(f"the API keys cannot be read: {reason}", path, _HINT) from error
        if os.name == "posix":
            _check_mode(mode & 0o777, path)
        return cls(_keys_of(text, path))

    def check(self, header: str | None) -> str:
        """The client that a request is from.

        Args:
            header: The value of `Authorization`, or None.

        Returns:
            `key:` and the key's name.

        Raises:
            UnauthorizedError: It brings no key, or not a known one.
        """
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthorizedError(
                "an API key is needed: send it as 'Authorization: Bearer KEY'", code="missing_api_key"
            )
        given = _digest(key.strip())
        found = [name for name, digest in self._digests.items() if hmac.compare_digest(digest, given)]
        if not found:
            raise UnauthorizedError("the API key is not known", code="invalid_api_key")
        return f"key:{found[0]}"


def _check_mode(mode: int, path: Path) -> None:
    """Refuse keys that others can change, and warn of keys that others can read.

    Secrets of containers are often readable for everybody, and there the server is the only one to read them.
    """
    hint = f"chmod 600 {shortened(str(path), 100)}; in Kubernetes, `defaultMode: 0440` of the volume"
    if mode & _OTHERS_WRITE:
        raise _refusal(f"other users can write the API keys (mode {mode:o})", path, hint)
    if mode & _OTHERS_READ:
        _LOG.warning("other users of this machine can read the API keys (mode %o): %s", mode, hint)


def _keys_of(text: str, path: Path) -> dict[str, str]:
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        left, colon, right = entry.partition(":")
        name, key = (left, right) if colon else ("", left)
        if not _KEY.fullmatch(key) or (colon and not _NAME.fullmatch(name)):
            raise _refusal(f"line {number} is no key", path, _HINT)
        if len(key) < MIN_KEY_CHARS:
            raise _refusal(f"the key of line {number} has fewer than {MIN_KEY_CHARS} characters", path, _HINT)
        name = name or _digest(key).hex()[:12]
        if name in keys or key in keys.values():
            raise _refusal(f"the key or the name of line {number} stands twice", path, _HINT)
        keys[name] = key
    if not keys:
        raise _refusal("the file has no API key", path, _HINT)
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _refusal(what: str, path: Path, hint: str) -> SettingsError:
    return SettingsError(what, ("api_key_file",), where=path, hint=hint)


def check_exposure(host: str, env: str, has_keys: bool) -> None:
    """See that nobody but this machine's users can ask without a key.

    Args:
        host: Address to listen on.
        env: `production` always needs keys.
        has_keys: Whether there are any.

    Raises:
        SettingsError: Keys are needed, and there are none.
    """
    if has_keys or (is_loopback(host) and env != "production"):
        return
    reason = (
        "env production" if env == "production" else f"the address {printable(host)!r}, not a loopback one,"
    )
    raise SettingsError(
        f"{reason} needs API keys",
        ("host", "env", "api_key_file"),
        hint="name a file of keys with FAST_VLM_API_KEY_FILE, or listen on 127.0.0.1 in development",
    )


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach an address; false for names other than localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
