"""How often a client may ask, which clients are banned, and who a client is.

The window slides over the very times of requests, so that no minute, wherever it begins, has more than
allowed, and Retry-After is true. The package `limits` was tried: its storage in memory reads the wall clock,
which can be set, starts a thread for every few requests that walks over all clients, and keeps as many
clients as come (99 MB for 200,000 addresses); its sliding window is an estimate, and so is Retry-After then.

Everything here is called from the server's event loop alone.
"""

import ipaddress
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

from fastvlm_convert.serve.errors import RateLimitedError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Clock = Callable[[], float]

MINUTE_S: Final = 60.0
MAX_TIMES: Final = 500_000  # of all clients; 32 bytes each
MAX_BANNED: Final = 50_000
REPEATED: Final = 10
"""Refusals within a minute that are an incident."""

_MAX_HOPS: Final = 32
_CLIENT_BITS: Final = 64  # of an IPv6 address; whoever has one has the rest


class Windows:
    """Times of the last minute, by client; of the clients that were seen last, if there are too many."""

    def __init__(self, max_times: int) -> None:
        """Begin with no clients.

        Args:
            max_times: Most times of all clients; more than one client ever has.
        """
        self._max_times = max_times
        self._times: OrderedDict[str, deque[float]] = OrderedDict()  # the client last added to is last
        self._count = 0

    def of(self, client: str, now: float) -> Sequence[float]:
        """A client's times within the minute before now, the oldest first."""
        times = self._times.get(client)
        if times is None:
            return ()
        while times and times[0] + MINUTE_S <= now:
            times.popleft()
            self._count -= 1
        if not times:
            self.forget(client)
        return times

    def add(self, client: str, now: float) -> None:
        """Remember a time; forget clients that are long gone, or too many."""
        self._times.setdefault(client, deque()).append(now)
        self._times.move_to_end(client)
        self._count += 1
        while self._count > self._max_times or next(iter(self._times.values()))[-1] + MINUTE_S <= now:
            self.forget(next(iter(self._times)))

    def forget(self, client: str) -> None:
        """Forget a client."""
        self._count -= len(self._times.pop(client, ()))

    def __len__(self) -> int:
        """Times that are remembered."""
        return self._count


class RateLimiter:
    """So many requests of a client within any sixty seconds, and no more; refused ones do not count."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic, max_times: int = MAX_TIMES) -> None:
        """Begin with no clients.

        Args:
            per_minute: Most requests; 0 sets no limit.
            clock: Seconds that never go back.
            max_times: Requests of all clients to remember; beyond, clients seen longest ago are forgotten.
        """
        self._limit, self._clock = per_minute, clock
        self._windows = Windows(max(max_times, per_minute + 1))

    def check(self, client: str) -> None:
        """Count a request.

        Raises:
            RateLimitedError: There were too many; after `retry_after_s` the next one is taken.
        """
        if not self._limit:
            return
        now = self._clock()
        times = self._windows.of(client, now)
        if len(times) >= self._limit:
            raise RateLimitedError(
                f"at most {self._limit} requests a minute are taken from one client",
                code="rate_limit_exceeded",
                retry_after_s=_whole_seconds(times[0] + MINUTE_S - now),
            )
        self._windows.add(client, now)

    def __len__(self) -> int:
        """Requests that are remembered, of all clients."""
        return len(self._windows)


class Strikes:
    """Notices clients whose requests are refused again and again."""

    def __init__(self, after: int = REPEATED, clock: Clock = time.monotonic) -> None:
        """Begin with no clients.

        Args:
            after: Refusals within a minute that are too many; at least 1.
            clock: Seconds that never go back.
        """
        self._after, self._clock = after, clock
        self._windows = Windows(max(MAX_TIMES, after + 1))

    def strike(self, client: str) -> bool:
        """Count a refusal; true if it makes too many, and counting then begins anew."""
        now = self._clock()
        is_too_many = len(self._windows.of(client, now)) + 1 >= self._after
        if is_too_many:
            self._windows.forget(client)
        else:
            self._windows.add(client, now)
        return is_too_many


class Bans:
    """Clients that get no answers for a while, because of too many incidents within a minute."""

    def __init__(self, after: int, seconds: float, clock: Clock = time.monotonic) -> None:
        """Begin with nobody banned.

        Args:
            after: Incidents within a minute that ban a client; 0 bans nobody.
            seconds: How long.
            clock: Seconds that never go back.
        """
        self._strikes = Strikes(after, clock) if after else None
        self._seconds, self._clock = seconds, clock
        self._until: OrderedDict[str, float] = OrderedDict()  # the ban that ends last is last

    def strike(self, client: str) -> bool:
        """Count an incident; true if it bans the client."""
        if self._strikes is None or not self._strikes.strike(client):
            return False
        now = self._clock()
        self._until[client] = now + self._seconds
        self._until.move_to_end(client)
        while len(self._until) > MAX_BANNED or next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        return True

    def check(self, client: str) -> None:
        """See that a client is not banned.

        Raises:
            RateLimitedError: It is; `retry_after_s` says until when.
        """
        until = self._until.get(client)
        if until is not None and (left := until - self._clock()) > 0:
            raise RateLimitedError(
                "too many of this client's requests looked like attacks, so none are taken for a while",
                code="banned",
                retry_after_s=_whole_seconds(left),
            )

    def __len__(self) -> int:
        """Bans that are remembered, some of which may have ended."""
        return len(self._until)


def _whole_seconds(seconds: float) -> float:
    """Rounded up, as Retry-After has no fractions."""
    return float(max(1, math.ceil(seconds)))


def client_address(peer: str | None, forwarded_for: Sequence[str], trusted: Sequence[str]) -> str:
    """The address that a request is from, as a name for its client.

    Whoever sends a request can write X-Forwarded-For, so it is believed as far as trusted proxies wrote it:
    from the right, the first address that is no trusted proxy's is the client's.

    Args:
        peer: Who opened the connection, or None for a Unix socket.
        forwarded_for: Values of X-Forwarded-For, in the order of the headers.
        trusted: Addresses or networks of proxies.

    Returns:
        An IPv4 address, the first 64 bits of an IPv6 address, or `local`.
    """
    if peer is None:
        return "local"
    networks = [ipaddress.ip_network(each, strict=False) for each in trusted]
    client = _address(peer)
    hops = [hop for value in reversed(forwarded_for) for hop in reversed(value.split(","))]
    for hop in hops[:_MAX_HOPS]:
        if client is None or not any(_is_in(client, network) for network in networks):
            break
        before = _address(hop)
        if before is None:
            break
        client = before
    if client is None:
        return "local"
    if isinstance(client, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(client), _CLIENT_BITS), strict=False))
    return str(client)


def _address(text: str) -> Address | None:
    """An address, with or without a port; None for what is none."""
    host = text.strip().strip('"')
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_in(address: Address, network: Network) -> bool:
    return address.version == network.version and address in network
