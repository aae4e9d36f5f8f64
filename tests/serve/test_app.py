"""The server from outside: replies, streams, errors, with the demo's bundle and with a scripted engine."""

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fastvlm_convert.messages import read_messages
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt import user_message
from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.serve.errors import InvalidRequestError, UnavailableError
from fastvlm_convert.serve.replies import error_response
from tests.serve.scripted_engine import ScriptedEngine
from tests.serve.servers import CHAT, PICTURES, Server, data_url, events_of, question, serving, text_of, until

NAMES = sorted(path.name for path in PICTURES.glob("*.png"))


@pytest.fixture(scope="module")
def served(demo_bundle):
    with serving(demo_bundle) as server:
        yield server


@pytest.fixture(scope="module")
def scripted(demo_bundle):
    with serving(demo_bundle, engine=ScriptedEngine(), cache_enabled=False, max_question_chars=100) as server:
        yield server


@pytest.fixture(scope="module")
def expected(demo_bundle):
    """What `run` answers, by picture."""
    loaded = load_bundle(demo_bundle)
    answers = {}
    for name in NAMES:
        stream = loaded.reply([user_message("Describe the image.", [load_image(PICTURES / name)])])
        stream.finish()
        answers[name] = stream.text
    assert len(set(answers.values())) > 10
    return answers


def test_answers_are_those_of_run_in_every_cache_state(served, expected):
    seen = []
    for cache in ("miss", "hit"):
        for name in NAMES:
            response = served.chat(question("Describe the image.", PICTURES / name))
            assert text_of(response) == expected[name]
            assert response.headers["x-fastvlm-cache"] == cache
        seen.append(cache)
    for name in NAMES:  # an equal answer that no cached answer helps: another limit, so the prefix is used
        response = served.chat(question("Describe the image.", PICTURES / name, max_tokens=255))
        assert text_of(response) == expected[name]
        assert response.headers["x-fastvlm-cache"] == "prefix"
        assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 16


def test_the_openai_client_works_unchanged(served, expected):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    (model,) = client.models.list()
    assert model.id == "demo"
    assert client.models.retrieve("demo").owned_by == "fastvlm-convert"
    messages: Any = question("Describe the image.", PICTURES / "03.png")["messages"]
    whole = client.chat.completions.create(model="demo", messages=messages)
    assert whole.choices[0].message.content == expected["03.png"]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model="demo",
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=250,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected["03.png"]
    assert len(chunks) > 10
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details if chunks[-1].usage else None}
    )
    with client.chat.completions.stream(model="demo", messages=messages, max_completion_tokens=240) as pieces:
        assert pieces.get_final_completion().choices[0].message.content == expected["03.png"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="demo", messages=messages, n=2)
    assert bad.value.param == "n"


def test_a_reply_says_where_its_time_went(served):
    body = question("How many things are there?", PICTURES / "05.png")
    response = served.chat(body, headers={"x-request-id": "mine-1"})
    reply = response.json()
    assert response.headers["x-request-id"] == "mine-1"
    assert reply["id"] == "chatcmpl-mine-1"
    assert set(reply["timings"]) == {"queue_ms", "vision_ms", "prefill_ms", "decode_ms"}
    assert reply["timings"]["decode_ms"] > 0
    assert reply["object"] == "chat.completion"
    again = served.chat(body)
    assert again.json()["timings"] == dict.fromkeys(reply["timings"], 0.0)
    assert re.fullmatch("[0-9a-f]{32}", again.headers["x-request-id"])
    forged = served.chat(body, headers={"x-request-id": 'a"b{}'})
    assert re.fullmatch("[0-9a-f]{32}", forged.headers["x-request-id"])


def test_a_stream_is_the_whole_answer_in_pieces(served, expected):
    body = question("Describe the image.", PICTURES / "07.png", stream=True, max_tokens=200)
    response = served.chat(body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(response)
    assert last == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == expected["07.png"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["timings"]["decode_ms"] > 0
    assert not any("usage" in chunk for chunk in chunks)


def test_several_messages_are_answered_as_run_answers_them(served, demo_bundle, tmp_path: Path):
    def request(image: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Look:"}, image]},
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": "What is at the top left?"},
        ]

    file = tmp_path / "messages.json"
    file.write_text(json.dumps(request({"type": "image", "image": str(PICTURES / "02.png")})))
    stream = load_bundle(demo_bundle).reply(read_messages(file))
    stream.finish()
    image = {"type": "image_url", "image_url": {"url": data_url(PICTURES / "02.png")}}
    assert text_of(served.chat({"messages": request(image)})) == stream.text


def test_a_limit_and_a_stop_text_end_an_answer(served, expected):
    whole = expected["00.png"]
    short = served.chat(question("Describe the image.", PICTURES / "00.png", max_tokens=3)).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    assert whole.startswith(short["choices"][0]["message"]["content"])
    stop = whole[10:14]  # across tokens
    stopped = served.chat(question("Describe the image.", PICTURES / "00.png", stop=[stop, "never"])).json()
    assert stopped["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    body = question("Describe the image.", PICTURES / "00.png", stop=stop, stream=True)
    *chunks, _ = events_of(served.chat(body))
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == whole[: whole.index(stop)]


def test_seeds_repeat_what_is_sampled_and_without_one_chance_decides(served):
    body = question("Describe the image.", PICTURES / "04.png", temperature=2.0, max_tokens=40)
    seeded = [served.chat({**body, "seed": 7}) for _ in range(2)]
    assert text_of(seeded[0]) == text_of(seeded[1])
    assert seeded[1].headers["x-fastvlm-cache"] == "hit"
    free = [served.chat(body) for _ in range(4)]
    assert all(each.headers["x-fastvlm-cache"] == "prefix" for each in free)
    assert len({text_of(each) for each in free}) > 1


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def url(text: str) -> dict[str, Any]:
    return user([{"type": "image_url", "image_url": {"url": text}}])


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"n": 2}, 400, "n", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type", "unsupported_value"),
        ({"logprobs": True}, 400, "logprobs", "unsupported_value"),
        ({"logit_bias": {"1": 1}}, 400, "logit_bias", "unsupported_value"),
        ({"presence_penalty": 0.1}, 400, "presence_penalty", "unsupported_value"),
        ({"frequency_penalty": -1}, 400, "frequency_penalty", "unsupported_value"),
        ({"store": True}, 400, "store", "unsupported_value"),
        ({"max_tokns": 5}, 400, "max_tokns", "unknown_field"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": 257}, 400, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 10**30}, 400, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens", "invalid_value"),
        ({"temperature": -0.1}, 400, "temperature", "invalid_value"),
        ({"temperature": "1"}, 400, "temperature", "invalid_value"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"seed": -1}, 400, "seed", "invalid_value"),
        ({"stop": [""]}, 400, "stop[0]", "invalid_value"),
        ({"stop": ["a"] * 5}, 400, "stop", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "bad_roles"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, 400, "messages", "bad_roles"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]", "invalid_value"),
        (user([]), 400, "messages[0].content", "invalid_value"),
        (user([{"type": "text"}]), 400, "messages[0].content[0].text", "missing_field"),
        (user([{"type": "input_audio"}]), 400, "messages[0].content[0]", "invalid_value"),
        (user("x" * 101), 400, "messages[0].content", "text_too_long"),
        (user([{"type": "text", "text": "x" * 51}] * 2), 400, "messages[0].content[1].text", "text_too_long"),
        (user("a\x07b"), 400, "messages[0].content", "control_characters"),
        (url("https://example.com/a.png"), 400, "messages[0].content[0].image_url.url", "url_scheme"),
        (url("file:///etc/passwd"), 400, "messages[0].content[0].image_url.url", "url_scheme"),
        (url("data:image/png;base64,####"), 400, "messages[0].content[0].image_url.url", "bad_base64"),
        (url("data:image/gif;base64,R0lG"), 415, "messages[0].content[0].image_url.url", "unsupported_type"),
        (
            url("data:image/png;base64,/9j/4AAQ"),
            415,
            "messages[0].content[0].image_url.url",
            "signature_mismatch",
        ),
        ({"model": "other"}, 404, "model", "model_not_found"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_in_openais_form(scripted, fields, status, param, code):
    response = scripted.chat({**question("Is it red?"), **fields})
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10
    assert scripted.service.bundles["demo"].path.admission.running == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "n": 1},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "service_tier": "auto"},
        {"stop": None, "seed": None, "temperature": None, "max_tokens": None, "stream": None},
        {"safety_identifier": "x", "prompt_cache_key": "y", "parallel_tool_calls": True},
    ],
)
def test_fields_that_change_nothing_are_taken(scripted, fields):
    assert text_of(scripted.chat({**question("Is it red?"), **fields})) == "It is red."


def test_an_earlier_reply_can_be_sent_back_as_it_came(scripted):
    client = openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none")
    messages: list[Any] = [{"role": "user", "content": "Is it red?"}]
    first = client.chat.completions.create(model="demo", messages=messages).choices[0].message
    again = [*messages, first.model_dump(), {"role": "user", "content": "Sure?"}]
    assert client.chat.completions.create(model="demo", messages=again).choices[0].message.content


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "application/json", 400, "invalid_json"),
        (b"{", "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid_value"),
        (b'{"messages": 1}', "application/json", 400, "invalid_value"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "content_type"),
    ],
)
def test_a_body_that_is_no_request_is_refused(scripted, body, kind, status, code):
    response = scripted.client.post(CHAT, content=body, headers={"content-type": kind})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", CHAT, 405), ("GET", "/v1/models/other", 404), ("POST", "/livez", 405)],
)
def test_paths_that_there_are_not_have_errors_of_the_same_form(scripted, method, path, status):
    response = scripted.client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_what_does_not_fit_the_context_is_400(served):
    response = served.chat(question("5" * 4000))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "max_tokens" in response.json()["error"]["message"]


def test_a_damaged_picture_is_422(served, tmp_path: Path):
    damaged = tmp_path / "damaged.png"
    data = bytearray((PICTURES / "00.png").read_bytes())
    data[60:200] = bytes(140)
    damaged.write_bytes(data)
    response = served.chat(question("Is it red?", damaged))
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "messages[0].content[0].image_url.url"


def statuses_of(document: dict[str, Any]) -> set[str]:
    return set(document["paths"][CHAT]["post"]["responses"])


def test_the_openapi_document_has_the_form_of_every_error(scripted):
    document = scripted.client.get("/openapi.json").json()
    wanted = {"200", "400", "401", "404", "408", "413", "415", "422", "429", "500", "503", "504"}
    assert statuses_of(document) == wanted
    for status in wanted - {"200"}:
        content = document["paths"][CHAT]["post"]["responses"][status]["content"]
        assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorReply"}
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    assert set(document["paths"]) >= {CHAT, "/v1/models", "/health", "/livez", "/readyz", "/metrics"}
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])


def test_the_documentation_is_hidden_in_production(demo_bundle, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("a-key-that-is-long-enough-for-anyone\n")
    keys.chmod(0o600)
    headers = {"authorization": "Bearer a-key-that-is-long-enough-for-anyone"}
    for env, status in (("development", 200), ("production", 404)):
        with serving(demo_bundle, engine=ScriptedEngine(), env=env, api_key_file=keys) as server:
            assert server.client.get("/docs", headers=headers).status_code == status


def failing(demo_bundle: Path, *commands: Any, **settings: Any) -> Any:
    return serving(
        demo_bundle, engine=ScriptedEngine(commands=list(commands)), cache_enabled=False, **settings
    )


def test_an_error_of_the_runtime_is_500_and_the_breaker_answers_after_five(demo_bundle):
    with failing(demo_bundle, *["fail"] * 5) as server:
        codes = [server.chat(question()).json()["error"]["code"] for _ in range(5)]
        assert codes == ["engine_failed"] * 5
        response = server.chat(question())
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "breaker_open"
        assert 1 <= int(response.headers["retry-after"]) <= 10
        assert server.client.get("/health").json()["status"] == "unhealthy"
        assert server.metric('fastvlm_breaker_state{model="demo",state="open"}') == 1


def test_a_dead_worker_is_503_and_a_mistake_of_ours_500(demo_bundle):
    with failing(demo_bundle, "die", "bug") as server:
        died = server.chat(question())
        assert (died.status_code, died.headers["retry-after"]) == (503, "1")
        assert server.chat(question()).status_code == 500
        assert text_of(server.chat(question())) == "It is red."


def test_a_hanging_engine_is_504(demo_bundle):
    with failing(demo_bundle, "hang", timeout_seconds=0.2) as server:
        assert server.chat(question()).status_code == 504
        until(lambda: server.service.bundles["demo"].path.admission.running == 0)
        assert text_of(server.chat(question())) == "It is red."


@pytest.mark.parametrize(("command", "code"), [("fail_midway", "engine_failed"), ("hang", "deadline")])
def test_a_stream_that_breaks_ends_with_an_error_and_without_done(demo_bundle, command, code):
    engine = ScriptedEngine(commands=[command], pieces=("a", "b") * 20)
    with serving(demo_bundle, engine=engine, cache_enabled=False, timeout_seconds=2) as server:
        if command == "hang":  # after the first piece
            engine.commands, engine.step_s = [], 0.2
        response = server.chat(question(stream=True))
        assert response.status_code == 200
        *chunks, last = events_of(response)
        assert last["error"]["code"] == code
        assert len(chunks) >= 1
        assert "[DONE]" not in response.text
        status = {"engine_failed": "500", "deadline": "504"}[code]
        name = f'fastvlm_requests_total{{cache="none",code="{status}",model="demo"}}'
        until(lambda: server.metric(name) == 1)


def test_a_stream_that_fails_before_its_first_piece_has_a_status(demo_bundle):
    with failing(demo_bundle, "fail") as server:
        assert server.chat(question(stream=True)).status_code == 500


def test_a_client_that_leaves_is_counted_and_frees_the_slot(demo_bundle):
    engine = ScriptedEngine(step_s=0.01, pieces=("x",) * 10_000)
    with serving(demo_bundle, engine=engine, cache_enabled=False) as server:
        for stream in (True, False):
            with pytest.raises(httpx.ReadTimeout):
                leave(server, question(stream=stream))
            until(lambda: engine.running == 0)
        until(lambda: server.metric("fastvlm_cancelled_total") == 2)
        name = 'fastvlm_requests_total{cache="none",code="499",model="demo"}'
        assert server.metric(name) == 2


def leave(server: Server, body: dict[str, Any]) -> None:
    with httpx.Client(base_url=server.url, timeout=0.3) as client:
        if not body["stream"]:
            client.post(CHAT, json=body)
            return
        with client.stream("POST", CHAT, json=body) as response:
            next(response.iter_lines())
        raise httpx.ReadTimeout("left on purpose")


def test_health_and_metrics_tell_what_happened(demo_bundle):
    with failing(demo_bundle) as server:
        empty = server.client.get("/health").json()
        assert (empty["status"], empty["success_rate_percent"]) == ("healthy", None)
        for _ in range(2):
            text_of(server.chat(question()))
        assert server.chat(question(n=3)).status_code == 400
        until(lambda: server.metric('fastvlm_requests_total{cache="miss",code="200",model="demo"}') == 2)
        health = server.client.get("/health").json()
        assert health["success_rate_percent"] == 100
        assert health["models"][0]["id"] == "demo"
        assert health["queue"] == {"length": 0, "limit": 64, "expected_wait_ms": 0}
        assert health["latency_ms"]["p50"] > 0
        assert server.metric('fastvlm_answer_tokens_total{model="demo"}') == 8
        assert server.metric('fastvlm_time_to_first_token_seconds_count{model="demo"}') == 2


def test_the_errors_body_has_no_more_than_openais_fields():
    assert InvalidRequestError("m", "p").body() == {
        "error": {"message": "m", "type": "invalid_request_error", "param": "p", "code": "invalid_value"}
    }


@pytest.mark.parametrize(("seconds", "told"), [(0.0, "1"), (1.0, "1"), (2.0001, "3"), (8.0, "8")])
def test_retry_after_is_never_too_early(seconds, told):
    error = UnavailableError("later", code="queue_full", retry_after_s=seconds)
    assert error_response(error).headers["retry-after"] == told


def test_a_mistake_outside_of_answers_is_an_error_as_all_others_and_counts(demo_bundle):
    class Mistaken(ScriptedEngine):
        errs = False

        def status(self):
            if self.errs:
                raise KeyError("what nobody may read")
            return super().status()

    engine = Mistaken()
    with serving(demo_bundle, engine=engine) as server:
        engine.errs = True
        for response in (server.client.get("/health"), server.chat(question("And now?"))):
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "internal"
            assert response.headers["x-request-id"]
        assert "what nobody may read" not in response.text
        engine.errs = False
        until(lambda: server.metric('fastvlm_requests_total{cache="none",code="500",model="demo"}') == 1)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/"])
def test_probes_and_the_page_answer_head_requests(served, path):
    response = served.client.head(path)
    assert (response.status_code, response.content) == (200, b"")


def test_the_uptime_does_not_follow_the_wall_clock(served, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 < served.client.get("/health").json()["uptime_s"] < 3600
