"""The page of examples/web, used in headless Chromium as a person uses it."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from fastvlm_convert.runtime.loaded import load_bundle
from tests.clients.browser import BUILDS, find_chromium, served
from tests.clients.cases import DEMO
from tests.clients.node import PACKAGES, need_packages, run_node
from tests.commands import ROOT, shell_blocks

WEB = ROOT / "docs" / "web.md"
PAGE = ROOT / "examples" / "web"
PICTURE = DEMO / "check_images" / "00.png"
HIGH_PICTURE = DEMO / "check_images" / "08.png"
QUESTION = "Describe the image."  # stands on the page already

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def visit(tmp_path_factory) -> dict[str, Any]:
    """What the page showed, served by the commands of the guide; `ours` and `high`, the answers of `run`."""
    chromium = find_chromium()
    folder = tmp_path_factory.mktemp("page")
    (commands, *_) = [block.commands for block in shell_blocks(WEB) if not block.needs_network]
    activate, export, (python, server, bundle, option, libraries) = commands
    assert (activate, python, option) == ((".", ".venv/bin/activate"), "python", "--libraries")
    subprocess.run(
        [sys.executable, "-m", "fastvlm_convert", *export[1:-1], folder / export[-1]], cwd=ROOT, check=True
    )
    assert bundle == export[-1]
    no_image = folder / "letter.png"
    no_image.write_text("Dear reader")
    with served(folder / bundle, ROOT / server, ROOT / libraries) as url:
        job = {
            "chromium": chromium,
            "url": url,
            "image": str(PICTURE),
            "high_image": str(HIGH_PICTURE),
            "no_image": str(no_image),
            "parts": ["firstVisit", "secondVisit", "troubles"],
            "output": str(folder / "seen.json"),
        }
        run_node("browser_page.mjs", json.dumps(job))
    model = load_bundle(folder / bundle)
    ours, high = ("".join(model.ask(picture, QUESTION)) for picture in (PICTURE, HIGH_PICTURE))
    return {"ours": ours, "high": high, "url": url, **json.loads((folder / "seen.json").read_text())}


def test_nothing_failed_and_nothing_came_from_elsewhere(visit):
    assert visit["errors"] == []
    assert {
        request for request in visit["requests"] if not request.startswith((visit["url"], "blob:", "data:"))
    } == set()


def test_it_says_what_to_do_and_what_it_will_download(visit):
    assert visit["empty"]["status"] == "Choose a picture to begin."
    assert visit["empty"]["disabled"]
    assert re.fullmatch(r"Download \d+\.\d MB and ask", visit["offer"])


def test_it_answers_as_run_does(visit):
    assert visit["answers"] == [visit["ours"]] * 3 + [visit["high"]]  # three visits, and that of a phone
    assert visit["ours"] in WEB.read_text(encoding="utf-8").replace("\n", " ")
    assert re.search(r"First token after .* tokens\)$", visit["note"])


def test_the_answer_is_shown_while_it_is_written(visit):
    texts = visit["shown"]["texts"]
    assert len(texts) > 20
    assert all(after.startswith(before) for before, after in pairwise(texts))


def test_progress_is_shown_in_megabytes(visit):
    found = [re.match(r"Downloading: ([\d.]+) of ([\d.]+) MB", text) for text in visit["shown"]["statuses"]]
    amounts = [(float(match[1]), float(match[2])) for match in found if match]
    assert len(amounts) > 3
    assert amounts == sorted(amounts)
    assert visit["shown"]["progress"][-1][0] <= visit["shown"]["progress"][-1][1]


def test_what_is_stored_is_shown_used_and_deleted(visit):
    assert float(visit["stored"].split()[0]) > 4
    assert visit["storedAfterDelete"] == 0
    assert [
        request for request in visit["secondRequests"] if "onnx" in request and "/libraries/" not in request
    ] == []


def test_stop_keeps_what_was_written(visit):
    assert visit["stoppedNote"].startswith("Stopped.")
    assert 0 < len(visit["stoppedAnswer"]) < len(visit["ours"])
    assert visit["ours"].startswith(visit["stoppedAnswer"])


def test_troubles_are_told_in_words(visit):
    assert visit["noPicture"] == '"letter.png" is no picture that this browser reads. Try a JPEG or PNG file.'
    assert visit["noNetwork"].startswith("The download did not succeed.")
    assert visit["noModel"].startswith("The model was not found")


def test_keyboards_and_screen_readers_get_everything(visit):
    assert visit["tabs"][:3] == ["file", "question", "ask"]
    assert visit["focusWhileAnswering"] == "stop"
    for role in ("heading", "button", "textbox", "status", "log"):
        assert f"- {role} " in visit["tree"] or f"- {role}:" in visit["tree"], role
    assert not re.search(r"- (button|textbox)(:|$)", visit["tree"], re.MULTILINE)  # each has a name


def test_a_phone_is_offered_its_camera(visit):
    assert visit["phoneTexts"][:2] == ["Choose a picture", "Take a photo"]


def test_the_sizes_of_the_runtime_are_right():
    need_packages()
    source = (PAGE / "worker.js").read_text(encoding="utf-8")
    sizes = {file: int(size) for file, size in re.findall(r"file: '([\w.-]+)', bytes: (\d+)", source)}
    runtime = PACKAGES / "onnxruntime-web" / "dist"
    assert sizes == {file: (runtime / f"{file}.wasm").stat().st_size for file in BUILDS.values()}


def test_everything_fits_and_can_be_read_in_both_color_schemes(visit):
    assert visit["faults"] == []
