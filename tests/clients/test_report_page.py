"""Pages of `report` in headless Chromium: nothing fails, nothing is loaded, everybody can read them.

With REPORT_SCREENSHOTS set to a folder, it also gets pictures of the page at both widths and in both schemes.
"""

import json
import os
from typing import Any

import pytest

from fastvlm_convert.report.page import SECTIONS
from tests.clients.browser import find_chromium
from tests.clients.node import run_node
from tests.commands import ROOT
from tests.report.pages import HOSTILE, full_page

SAMPLE = ROOT / "docs" / "report-sample.html"
SERIOUS = {"serious", "critical"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["full", "sample"])
def visit(request, fp32_bundle, tmp_path_factory) -> dict[str, Any]:
    """What a browser saw of a page, and its `address`."""
    chromium = find_chromium()
    folder = tmp_path_factory.mktemp("page")
    page = SAMPLE
    if request.param == "full":
        page = folder / "page.html"
        page.write_text(full_page(fp32_bundle, folder), encoding="utf-8")
    screenshots = os.environ.get("REPORT_SCREENSHOTS")
    job = {
        "chromium": chromium,
        "page": str(page),
        "screenshots": screenshots and f"{screenshots}/{request.param}",
        "output": str(folder / "seen.json"),
    }
    run_node("report_page.mjs", json.dumps(job))
    return {"address": page.as_uri(), **json.loads((folder / "seen.json").read_text())}


def test_it_was_seen_at_both_widths_in_both_schemes(visit):
    seen = {(one["width"], one["colorScheme"]): one["ground"] for one in visit["visits"]}
    assert set(seen) == {(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")}
    assert seen[390, "light"] == seen[1440, "light"] != seen[1440, "dark"]
    assert visit["print"] == {"wide": 0, "ground": seen[1440, "light"]}  # on paper it is light, and fits


def test_nothing_fails_and_nothing_is_loaded(visit):
    assert visit["errors"] == []
    assert {request for request in visit["requests"] if not request.startswith("data:")} == {visit["address"]}
    for one in visit["visits"]:
        assert (one["scripts"], one["handlers"]) == (0, [])


def test_every_picture_and_figure_is_there(visit):
    for one in visit["visits"]:
        assert one["pictures"] >= 2
        assert (one["broken"], one["emptyFigures"]) == ([], 0)
        assert len(one["figures"]) >= 4
        assert all(one["figures"])


def test_nothing_is_wider_than_the_window_or_too_small_to_read(visit):
    for one in visit["visits"]:
        assert (one["wide"], one["wideOpened"], one["small"]) == (0, 0, 0), (one["width"], one["colorScheme"])


def test_axe_finds_no_serious_fault(visit):
    faults = [fault for one in visit["visits"] for fault in one["faults"] if fault["impact"] in SERIOUS]
    assert faults == []


def test_links_lead_somewhere(visit):
    for one in visit["visits"]:
        assert (one["unfound"], one["twice"]) == ([], [])
        assert set(SECTIONS) <= set(one["sections"])


def test_a_hostile_answer_is_shown_as_it_is(visit):
    if visit["address"].endswith("page.html"):
        assert HOSTILE.replace("\x07", "") in visit["visits"][0]["text"].replace("\x07", "")
