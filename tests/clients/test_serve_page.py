"""The page of `serve`, used in headless Chromium as a person uses it.

With SERVE_SCREENSHOTS set to a folder, it also gets pictures of the page at both widths and in both schemes.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm_convert.checkpoint.tokenizer import read_tokenizer
from fastvlm_convert.serve.page import PATHS
from tests.clients.browser import find_chromium
from tests.clients.cases import DEMO
from tests.clients.node import run_node
from tests.clients.obedient_engine import HOSTILE, WORDS, ObedientEngine
from tests.serve.servers import serving

PICTURE = DEMO / "check_images" / "00.png"
QUESTIONS = ["Describe the image.", "Say something hostile.", "Describe the image."]
KEY = "correct-horse-battery-staple"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def visit(fp32_bundle, tmp_path_factory) -> dict[str, Any]:
    """What the page showed, and the `address` it had."""
    chromium = find_chromium()
    folder = tmp_path_factory.mktemp("page")
    (folder / "letter.png").write_text("Dear reader")
    Image.open(PICTURE).save(folder / "picture.avif")
    (folder / "keys").write_text(f"{KEY}\n")
    (folder / "keys").chmod(0o600)
    small, large = (Path(shutil.copytree(fp32_bundle, folder / name)) for name in ("small", "large"))
    engine = ObedientEngine(read_tokenizer(small))
    with (
        serving(small, large, engine=engine) as server,
        serving(small, engine=engine, api_key_file=folder / "keys") as locked_server,
    ):
        address, locked = (f"{one.url}/" for one in (server, locked_server))
        job = {
            "chromium": chromium,
            "parts": ["ask", "troubles", "key"],
            "url": address,
            "key_url": locked,
            "key": KEY,
            "image": str(PICTURE),
            "no_image": str(folder / "letter.png"),
            "other_format": str(folder / "picture.avif"),
            "questions": QUESTIONS,
            "second_model": "large",
            "endless": "An endless answer, please.",
            "troubles": {"busy": "Are you busy?", "failed": "Please fail.", "broken": "Please break."},
            "screenshots": os.environ.get("SERVE_SCREENSHOTS"),
            "output": str(folder / "seen.json"),
        }
        run_node("serve_page.mjs", json.dumps(job))
    return {"address": address, "locked": locked, **json.loads((folder / "seen.json").read_text())}


def test_a_picture_is_dropped_and_an_answer_is_seen_while_it_is_written(visit):
    assert visit["disabled"]  # there is nothing to ask about before
    written = ["".join(WORDS[:count]) for count in range(1, len(WORDS) + 1)]
    assert visit["shown"][-1] == written[-1]
    assert len(set(visit["shown"]) & set(written)) >= 4  # the browser may show two at once
    assert (visit["busyWhileAnswering"], visit["busyAfterwards"]) == ("true", "false")


def test_the_request_is_openais_and_the_picture_is_sent_as_it_is(visit):
    first = visit["posts"][0]
    assert (first["model"], first["stream"]) == (visit["modelsOffered"][0], True)
    (message,) = first["messages"]
    picture, text = message["content"]
    assert text == {"type": "text", "text": QUESTIONS[0]}
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")  # though it was called .jpg


def test_timings_and_the_cache_are_told(visit):
    for fact in ("First token", "Whole answer", "6 (prompt 48)", "vision 22 ms", "decode 12 ms"):
        assert fact in visit["facts"], fact
    newest, *_, oldest = visit["articles"]
    assert "nothing from the cache" in oldest
    assert newest.startswith(QUESTIONS[-1])


def test_several_questions_are_asked_about_one_picture(visit):
    assert len(visit["articles"]) == len(QUESTIONS)
    assert visit["answers"][0] == visit["answers"][2] == "".join(WORDS)


def test_a_hostile_answer_is_text(visit):
    assert visit["answers"][1] == "".join(HOSTILE)
    assert visit["elements"] == 0


def test_nothing_fails_and_nothing_is_loaded_from_elsewhere(visit):
    """Neither errors of scripts, nor violations of the policy, nor dialogs."""
    assert visit["errors"] == []
    ours = (visit["address"], visit["locked"])
    fetched = {url for url in visit["requests"] if not url.startswith("blob:")}
    paths = {f"/{url.removeprefix(start)}" for url in fetched for start in ours if url.startswith(start)}
    assert all(url.startswith(ours) for url in fetched)
    assert paths == PATHS | {"/v1/models", "/v1/chat/completions"}


def test_a_model_is_chosen_where_there_are_several(visit):
    assert {"small", "large"} <= set(visit["modelsOffered"])
    assert visit["modelChoice"]
    assert visit["otherModel"].startswith(f"{QUESTIONS[0]} (large)")
    assert "large" in {post["model"] for post in visit["posts"]}


def test_an_answer_is_stopped(visit):
    text = visit["stopped"]
    assert WORDS[0] in text
    assert text.endswith("Stopped.")
    assert len(text) < 2000


def test_refusals_and_broken_answers_are_told(visit):
    assert visit["busy"]["error"] == "Many requests wait already. Try again in 7 s."
    assert visit["failed"]["error"] == "The bundle's runtime raised an error."
    assert visit["busy"]["added"] == visit["failed"]["added"] == 0
    assert visit["broken"]["error"] == "The bundle's runtime raised an error."
    assert visit["broken"]["newest"].endswith("The answer is not complete.")
    assert '"letter.png" is no picture that this browser reads.' in visit["noImage"]


def test_other_formats_are_sent_as_png(visit):
    assert "Sent as PNG" in visit["converted"]
    assert visit["convertedError"] == ""


def test_the_key_is_asked_for_and_kept_in_the_tab_alone(visit):
    assert visit["keyFocus"] == "key"
    assert visit["keyRefused"]
    assert "".join(WORDS) in visit["keyAnswer"]
    assert "".join(WORDS) in visit["keyAnswerAfterReload"]
    assert visit["kept"] == [0, "", visit["locked"]]
    assert not any(KEY in url or "wrong" in url for url in visit["requests"])


def test_keyboards_and_screen_readers_get_everything(visit):
    assert (visit["focusWhileAnswering"], visit["focusAfterwards"]) == ("stop", "question")
    for name in ('textbox "Question"', 'button "Ask"', 'combobox "Model"', 'log "Answers"', "- status"):
        assert name in visit["tree"], name


def test_axe_finds_nothing_and_everything_fits_at_both_widths_in_both_schemes(visit):
    assert visit["faults"] == []
    assert visit["wide"] == []
