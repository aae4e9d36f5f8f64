"""Log lines: one JSON object each, with nothing in them that clients can use or that is theirs."""

import io
import json
import logging
import threading
import time
import warnings

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_convert.serve.engine import StageTimings
from fastvlm_convert.serve.logs import (
    Access,
    ClientHasher,
    JsonFormatter,
    TextFormatter,
    log_access,
    set_up_logs,
)

SECRET = "planted-secret-7f3a"
ACCESS = Access(
    request_id="req-1",
    client="0123456789abcdef",
    route="/v1/chat/completions",
    code=200,
    seconds=0.25,
    model="int4",
    cache="feature",
    timings=StageTimings(1, 0, 20.5, 30),
    prompt_tokens=48,
    answer_tokens=12,
)


@pytest.fixture
def stream():
    """Standard error, as it were; what logging was before comes back."""
    names = [None, "fastvlm_convert", "uvicorn"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield io.StringIO()
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    logging.captureWarnings(False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def record(message, fields=None):
    made = logging.LogRecord("fastvlm_convert.serve.x", logging.INFO, "x.py", 1, message, (), None)
    if fields is not None:
        made.fields = fields
    return made


def test_a_request_is_one_line_with_where_its_time_went(stream):
    set_up_logs("json", stream)
    log_access(ACCESS)
    [line] = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "fastvlm_convert.serve.access",
        "message": "request",
        "request_id": "req-1",
        "client": "0123456789abcdef",
        "route": "/v1/chat/completions",
        "model": "int4",
        "code": 200,
        "cache": "feature",
        "total_ms": 250.0,
        "queue_ms": 1,
        "vision_ms": 0,
        "prefill_ms": 20.5,
        "decode_ms": 30,
        "prompt_tokens": 48,
        "answer_tokens": 12,
    }


def test_a_request_without_an_answer_has_its_error_and_nothing_that_it_lacks(stream):
    set_up_logs("json", stream)
    log_access(Access("req-2", "ff", "/v1/chat/completions", 503, 0.001, error="queue_full"))
    [line] = lines(stream)
    assert line["level"] == "error"
    assert line["error"] == "queue_full"
    assert not {"model", "cache", "vision_ms", "answer_tokens"} & set(line)


def test_a_terminal_gets_text_and_a_file_gets_json(stream):
    terminal = Terminal()
    set_up_logs("auto", terminal)
    log_access(ACCESS)
    assert "INFO    request request_id=req-1" in terminal.getvalue()
    assert "model=int4 code=200 cache=feature total_ms=250.0" in terminal.getvalue()
    set_up_logs("auto", stream)
    log_access(ACCESS)
    assert lines(stream)[0]["request_id"] == "req-1"
    assert terminal.getvalue().count("\n") == 1
    set_up_logs("json", terminal)
    log_access(ACCESS)
    assert json.loads(terminal.getvalue().splitlines()[1])


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
@given(value=st.text())
def test_nobody_can_forge_a_line_or_control_a_terminal(formatter, value):
    line = formatter.format(record(value, {"request_id": value}))
    assert len(line.splitlines()) == 1
    assert all(character.isprintable() or character == "\x7f" for character in line)
    line.encode()


@given(value=st.text())
def test_json_gives_back_what_it_was_given(value):
    document = json.loads(JsonFormatter().format(record(value, {"error": value[:200]})))
    assert document["message"] == value
    assert document["error"] == value[:200]


def test_a_forged_request_id_stays_inside_its_value(stream):
    forged = 'x"}\n{"level":"info","message":"request","code":200}\r\n\x1b[2J\u2028'
    set_up_logs("json", stream)
    log_access(Access(forged, "ff", "/v1/chat/completions", 400, 0.001))
    [line] = lines(stream)
    assert line["request_id"] == forged
    assert line["code"] == 400
    terminal = Terminal()
    set_up_logs("text", terminal)
    log_access(Access("a=b code=200", "ff", "/", 400, 0.001))
    assert 'request_id="a=b code=200"' in terminal.getvalue()


def test_a_long_value_is_shortened(stream):
    set_up_logs("json", stream)
    log_access(Access("x" * 10_000, "ff", "/", 400, 0.001))
    assert len(stream.getvalue()) < 600


def test_an_exception_is_its_type_and_place_without_its_message(stream):
    set_up_logs("json", stream)
    try:
        try:
            int(SECRET)
        except ValueError as error:
            raise RuntimeError(f"about {SECRET}") from error
    except RuntimeError:
        logging.getLogger("fastvlm_convert.serve.app").exception("a bug")
    [line] = lines(stream)
    assert line["message"] == "a bug"
    assert "RuntimeError at test_logs.py:" in line["exception"]
    assert "; from ValueError at test_logs.py:" in line["exception"]
    assert SECRET not in stream.getvalue()


def test_warnings_are_lines_too_and_other_libraries_stay_quiet(stream):
    set_up_logs("json", stream)
    logging.getLogger("sse_starlette.sse").debug("chunk: %s", SECRET)
    logging.getLogger("sse_starlette.sse").info("chunk: %s", SECRET)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", UserWarning, stacklevel=1)
    [line] = lines(stream)
    assert line["level"] == "warning"
    assert "careful" in line["message"]


def test_clients_cannot_be_told_from_their_hashes():
    hasher = ClientHasher()
    assert hasher("192.0.2.1") == hasher("192.0.2.1")
    assert hasher("192.0.2.1") != hasher("192.0.2.2")
    assert ClientHasher()("192.0.2.1") != hasher("192.0.2.1")
    assert ClientHasher(b"known")("192.0.2.1") == ClientHasher(b"known")("192.0.2.1")
    assert len(hasher("192.0.2.1")) == 16
    assert hasher("\udcff\n")
    assert "secret" not in repr(hasher)


def test_uvicorn_logs_through_the_same_formatter_and_no_secret_of_a_request_appears(stream):
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def fail(request: Request):
        body = await request.json()
        raise ValueError(f"cannot use {body['prompt']} with {request.headers['authorization']}")

    set_up_logs("json", stream)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reply = httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions?q={SECRET}",
            json={"prompt": SECRET},
            headers={"authorization": f"Bearer {SECRET}", "x-request-id": SECRET},
        )
        assert reply.status_code == 500
    finally:
        server.should_exit = True
        thread.join()
    messages = [line["message"] for line in lines(stream)]
    assert any(message.startswith("Uvicorn running on") for message in messages)
    [failed] = [line for line in lines(stream) if line["level"] == "error"]
    assert failed["logger"] == "uvicorn.error"
    assert "ValueError at" in failed["exception"]
    assert SECRET not in stream.getvalue()
    assert "/v1/chat" not in stream.getvalue()
