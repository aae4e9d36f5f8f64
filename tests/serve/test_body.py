"""Bodies: refused as soon as they are known to be too large, and no bomb when read as JSON."""

import asyncio
import time

import pytest

from fastvlm_convert.serve.body import MAX_VALUES, BodyLimit, body_limit, check_values
from fastvlm_convert.serve.errors import CancelledError, InvalidRequestError, RequestError, UnavailableError
from fastvlm_convert.serve.schema import read_request
from tests.serve.pictures import SETTINGS


class Exchange:
    """One request to an application behind the middleware, and what came of it."""

    def __init__(self, chunks, headers=(), max_bytes=100, **options):
        self.chunks, self.headers = list(chunks), [(k.encode(), v.encode()) for k, v in headers]
        self.received = 0
        self.seen = None
        self.sent = []
        self.limit = BodyLimit(self.app, max_bytes, **options)
        asyncio.run(self.run())

    async def app(self, scope, receive, send):
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(message["body"])
            more = message["more_body"]
        self.seen = b"".join(parts)
        self.after = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def receive(self):
        if self.received == len(self.chunks):
            return {"type": "http.disconnect"}
        chunk = self.chunks[self.received]
        self.received += 1
        if chunk is None:
            await asyncio.sleep(60)
        is_last = self.received == len(self.chunks)
        return {"type": "http.request", "body": chunk, "more_body": not is_last}

    async def send(self, message):
        self.sent.append(message)

    async def run(self):
        scope = {"type": "http", "method": "POST", "path": "/", "headers": self.headers}
        try:
            await self.limit(scope, self.receive, self.send)
        except RequestError as error:
            self.error, self.status = error, int(error.status)
        else:
            self.error, self.status = None, self.sent[0]["status"]


def test_a_body_within_the_limit_arrives_whole():
    exchange = Exchange([b"a" * 50, b"", b"b" * 50], [("content-length", "100")])
    assert (exchange.status, exchange.seen) == (200, b"a" * 50 + b"b" * 50)
    assert exchange.after == {"type": "http.disconnect"}
    assert exchange.limit.held == 0


def test_a_length_that_is_too_large_is_refused_before_anything_is_read():
    exchange = Exchange([b"a"] * 200, [("content-length", "101")])
    assert (exchange.status, exchange.received, exchange.seen) == (413, 0, None)
    assert exchange.error.code == "body_too_large"
    assert "100 B" in exchange.error.message


@pytest.mark.parametrize("headers", [[], [("content-length", "5")], [("transfer-encoding", "chunked")]])
def test_a_body_that_is_larger_than_it_says_is_refused_where_it_crosses_the_limit(headers):
    exchange = Exchange([b"a" * 30] * 1000, headers)
    assert (exchange.status, exchange.received, exchange.seen) == (413, 4, None)
    assert exchange.limit.held == 0


@pytest.mark.parametrize("length", ["-1", "1e3", "\u0665", "", "9" * 5000])
def test_a_length_that_is_no_number(length):
    headers = [("content-length", length)] if length.isascii() else [("content-length", "x")]
    assert Exchange([b"a"], headers).status == 400


def test_a_client_that_leaves_gets_no_answer():
    class Leaving(Exchange):
        async def receive(self):
            message = await super().receive()
            return {**message, "more_body": True} if "body" in message else message

    exchange = Leaving([b"a"])
    assert isinstance(exchange.error, CancelledError)
    assert (exchange.sent, exchange.seen, exchange.limit.held) == ([], None, 0)


def test_a_body_that_does_not_come_ends_the_request():
    start = time.monotonic()
    exchange = Exchange([b"a", None], seconds=0.05)
    assert (exchange.status, exchange.error.code) == (408, "slow_body")
    assert time.monotonic() - start < 10
    assert exchange.limit.held == 0


def test_bodies_of_all_requests_are_limited_together():
    exchange = Exchange([b"a" * 30] * 3, max_bytes_at_once=80)
    assert (exchange.status, exchange.error.code) == (503, "queue_full")
    assert exchange.error.retry_after_s == 1


def test_what_is_being_answered_counts():
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        await receive()
        inside.set()
        await go_on.wait()

    async def main():
        limit = BodyLimit(app, 100, max_bytes_at_once=150)
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}

        async def receive():
            return {"type": "http.request", "body": b"a" * 100, "more_body": False}

        first = asyncio.create_task(limit(scope, receive, None))
        await inside.wait()
        held = limit.held
        with pytest.raises(UnavailableError):
            await limit(scope, receive, None)
        go_on.set()
        await first
        return held, limit.held

    assert asyncio.run(main()) == (100, 0)


def test_errors_of_the_application_are_its_own():
    async def app(scope, receive, send):
        raise InvalidRequestError("inside")

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    limit = BodyLimit(app, 100)
    with pytest.raises(InvalidRequestError, match="inside"):
        asyncio.run(limit({"type": "http", "headers": []}, receive, None))
    assert limit.held == 0


def test_the_limit_takes_what_settings_allow():
    pictures = SETTINGS.max_images * SETTINGS.max_image_size_mb * 1e6
    assert pictures * 4 / 3 < body_limit(SETTINGS) < pictures * 4 / 3 + 2e6


# JSON


def read(body):
    """As the server does."""
    check_values(body)
    return read_request(body)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"messages": [' + b"[]," * 60_000 + b"[]]}",
        b'{"messages": [' + b"{}," * 60_000 + b"{}]}",
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"temperature": 1e999}',
        b'{"temperature": NaN}',
        b'{"messages": "\xff"}',
        '{"messages": []}'.encode("utf-16"),
        b"null",
    ],
)
def test_json_bombs_are_400(body):
    with pytest.raises(InvalidRequestError) as caught:
        read(body)
    assert len(caught.value.message) < 400


def test_values_are_counted_before_they_take_memory():
    start = time.process_time()
    with pytest.raises(InvalidRequestError, match=str(MAX_VALUES)):
        read(b'{"messages": [' + b"[]," * 10_000_000 + b"[]]}")
    assert time.process_time() - start < 2
