"""The server with several bundles: which one answers, by name, by weight and by how sure it is."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.prompt import user_message
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.serve.served_bundle import ServedBundle, open_served_bundle
from tests.planted import DEMO
from tests.serve.scripted_engine import ScriptedEngine
from tests.serve.servers import CHAT, PICTURES, Server, events_of, question, serving, text_of, until

UNSURE = -0.5
MARGIN = {"escalation_to": "large", "escalation_threshold": -0.1}


@pytest.fixture(scope="module")
def pair(demo_bundle: Path) -> tuple[ServedBundle, ServedBundle]:
    """One bundle under two names, for scripted engines."""
    return open_served_bundle(demo_bundle, "small"), open_served_bundle(demo_bundle, "large")


def engines(**small: Any) -> dict[str, ScriptedEngine]:
    return {
        "small": ScriptedEngine(pieces=("I ", "am ", "small."), **small),
        "large": ScriptedEngine(pieces=("I ", "am ", "large.")),
    }


@pytest.fixture(scope="module")
def split(pair: tuple[ServedBundle, ServedBundle]) -> Iterator[Server]:
    weights = {"small": 75.0, "large": 25.0}
    with serving(*pair, engine=engines(), weights=weights, cache_enabled=False) as server:
        yield server


def ask_from(server: Server, address: str, model: str | None = None) -> str:
    """Ask from another address of this machine; which bundle answered."""
    fields = {} if model is None else {"model": model}
    with httpx.Client(transport=httpx.HTTPTransport(verify=False, local_address=address)) as client:
        response = client.post(server.url + CHAT, json=question(**fields))
    assert response.json()["model"] == response.headers["x-fastvlm-model"]
    return response.headers["x-fastvlm-model"]


def test_every_name_is_listed(split):
    client = openai.OpenAI(base_url=f"{split.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["fastvlm", "small", "large"]
    assert client.models.retrieve("fastvlm").id == "fastvlm"
    assert client.models.retrieve("large").id == "large"


def test_an_unknown_model_is_a_404_that_lists_those_there_are(split):
    for response in (split.chat(question(model="gpt-4o")), split.client.get("/v1/models/gpt-4o")):
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert all(name in error["message"] for name in ("fastvlm", "small", "large"))
    client = openai.OpenAI(base_url=f"{split.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=question()["messages"])


def test_clients_of_the_group_are_split_by_weight_and_stay(split):
    addresses = [f"127.0.3.{n}" for n in range(1, 61)]
    first = {address: ask_from(split, address, "fastvlm") for address in addresses}
    again = {address: ask_from(split, address) for address in addresses}
    assert first == again
    shares = Counter(first.values())
    assert 33 <= shares["small"] <= 57  # 45 of 60, within 3.5 deviations


def test_a_request_that_names_a_bundle_gets_it(split):
    before = {name: split.metric(f'fastvlm_requests_total{{cache="miss",code="200",model="{name}"}}')
              for name in ("small", "large")}  # fmt: skip
    for n in range(1, 6):
        assert ask_from(split, f"127.0.4.{n}", "large") == "large"
    after = {name: split.metric(f'fastvlm_requests_total{{cache="miss",code="200",model="{name}"}}')
             for name in ("small", "large")}  # fmt: skip
    assert after == {"small": before["small"], "large": before["large"] + 5}


def test_a_name_of_the_group_can_be_set(pair):
    with serving(*pair, engine=engines(), model_name="prod", weights={"small": 0.0, "large": 1.0}) as server:
        assert text_of(server.chat(question(model="prod"))) == "I am large."
        assert server.chat(question(model="fastvlm")).status_code == 404


def test_without_escalation_no_engine_is_asked_for_log_probabilities(pair):
    both = engines(mean_logprob=UNSURE)
    with serving(*pair, engine=both, weights={"small": 1.0, "large": 0.0}) as server:
        response = server.chat(question())
        assert text_of(response) == "I am small."
        assert "x-fastvlm-escalation" not in response.headers
        assert "escalation" not in response.json()["usage"]
        assert not both["large"].questions
        assert not both["small"].questions[0].wants_logprob


@pytest.mark.parametrize("stream", [False, True])
def test_an_unsure_answer_is_replaced_by_the_large_bundle_s(stream, pair):
    with serving(*pair, engine=engines(mean_logprob=UNSURE), **MARGIN) as server:
        body = question(stream=stream)
        if stream:
            body["stream_options"] = {"include_usage": True}
        response = server.chat(body)
        assert response.headers["x-fastvlm-model"] == "large"
        assert response.headers["x-fastvlm-escalation"] == "escalated"
        if stream:
            chunks = [event for event in events_of(response) if event != "[DONE]"]
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == (
                "I am large."
            )
            assert {chunk["model"] for chunk in chunks} == {"large"}
            usage = chunks[-1]["usage"]
        else:
            assert text_of(response) == "I am large."
            usage = response.json()["usage"]
        assert usage["completion_tokens"] == 4
        assert usage["escalation"] == {
            "outcome": "escalated",
            "first_model": "small",
            "first_mean_logprob": UNSURE,
            "first_prompt_tokens": 7,
            "first_completion_tokens": 4,
        }
        # A request is counted when its stream has ended, which its client may see first.
        until(lambda: server.metric('fastvlm_requests_total{cache="miss",code="200",model="large"}') == 1)
        assert server.metric('fastvlm_escalations_total{model="small",outcome="escalated"}') == 1
        assert server.metric('fastvlm_requests_total{cache="miss",code="200",model="small"}') == 0
        assert server.metric('fastvlm_answer_tokens_total{model="small"}') == 4  # it was paid for


def test_a_sure_answer_is_kept(pair):
    both = engines(mean_logprob=-0.05)
    with serving(*pair, engine=both, **MARGIN) as server:
        response = server.chat(question(stream=True))
        assert response.headers["x-fastvlm-escalation"] == "kept"
        assert {event["model"] for event in events_of(response) if event != "[DONE]"} == {"small"}
        assert not both["large"].questions
        until(lambda: server.metric('fastvlm_escalations_total{model="small",outcome="kept"}') == 1)
        again = server.chat(question())
        assert (again.headers["x-fastvlm-cache"], again.headers["x-fastvlm-escalation"]) == ("hit", "kept")
        assert len(both["small"].questions) == 1


@pytest.mark.parametrize("fields", [{"model": "small"}, {"temperature": 0.7}])
def test_what_names_a_bundle_or_samples_is_not_escalated(fields, pair):
    both = engines(mean_logprob=UNSURE)
    with serving(*pair, engine=both, **MARGIN) as server:
        response = server.chat(question(**fields))
        assert text_of(response) == "I am small."
        assert "x-fastvlm-escalation" not in response.headers
        assert not both["large"].questions


@pytest.mark.parametrize("hanging", ["small", "large"])
def test_one_deadline_holds_for_both(hanging, pair):
    both = engines(mean_logprob=UNSURE)
    both[hanging].commands.append("hang")
    with serving(*pair, engine=both, timeout_seconds=0.5, **MARGIN) as server:
        assert server.chat(question()).status_code == 504
        until(lambda: both[hanging].running == 0)


@pytest.mark.parametrize("hanging", ["small", "large"])
def test_a_client_that_leaves_ends_whichever_runs(hanging, pair):
    both = engines(mean_logprob=UNSURE)
    both[hanging].commands.append("hang")
    with serving(*pair, engine=both, **MARGIN) as server:

        def leave() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + CHAT, json=question(), timeout=0.3)

        thread = threading.Thread(target=leave)
        thread.start()
        until(lambda: both[hanging].running == 1)
        thread.join()
        until(lambda: both[hanging].running == 0)
        until(lambda: server.metric("fastvlm_cancelled_total") == 1)
        assert len(both["large"].questions) == (1 if hanging == "large" else 0)


def test_an_error_of_the_large_bundle_is_the_request_s(pair):
    both = engines(mean_logprob=UNSURE)
    both["large"].commands.append("die")
    with serving(*pair, engine=both, **MARGIN) as server:
        response = server.chat(question())
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "worker_died"


@pytest.fixture(scope="module")
def float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("served") / "float"
    export(DEMO, output, recipe=load_recipe("fp32"), targets=["onnx"])
    return output


@pytest.mark.parametrize(("threshold", "name"), [(-1e9, "small"), (0.0, "large")])
def test_real_answers_are_those_of_run_of_the_bundle_that_answered(
    threshold, name, demo_bundle, float_bundle
):
    paths = {"small": demo_bundle, "large": float_bundle}
    bundles = [open_served_bundle(path, name) for name, path in paths.items()]
    loaded = load_bundle(paths[name], "onnx")
    settings: dict[str, Any] = {"escalation_to": "large", "escalation_threshold": threshold}
    with serving(*bundles, **settings) as server:
        for picture in sorted(PICTURES.glob("*.png"))[:4]:
            stream = loaded.reply([user_message("Describe the image.", [load_image(picture)])])
            stream.finish()
            for body in (question("Describe the image.", picture), question("Describe it.", picture)):
                response = server.chat(body)
                assert response.headers["x-fastvlm-model"] == name
            assert text_of(server.chat(question("Describe the image.", picture))) == stream.text
            judged = response.json()["usage"]["escalation"]
            assert judged["first_model"] == "small"
            assert -5 < judged["first_mean_logprob"] < 0
