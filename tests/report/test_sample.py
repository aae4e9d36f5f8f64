"""The page in docs/ is one that today's code would write, as far as its structure goes.

`make demo`, then copy out/demo/report.html over it.
"""

from fastvlm_convert.report.page import SECTIONS
from tests.commands import ROOT
from tests.report.pages import Elements, full_page

SAMPLE = ROOT / "docs" / "report-sample.html"
MAX_BYTES = 400_000


def headings(page: str) -> list[str]:
    """Headings of sections, in order."""
    return [page.partition(f'<h2 id="{name}-title">')[2].partition("</h2>")[0] for name in SECTIONS]


def style(page: str) -> str:
    """The style sheet."""
    return page.partition("<style>")[2].partition("</style>")[0]


def test_the_sample_is_not_stale(fp32_bundle, tmp_path):
    text = SAMPLE.read_text(encoding="utf-8")
    today = full_page(fp32_bundle, tmp_path)
    sample, page = Elements(text), Elements(today)
    assert [a["id"] for a in sample.named("section")] == list(SECTIONS)
    assert headings(text) == headings(today)
    assert sample.named("meta") == page.named("meta")
    assert style(text) == style(today)


def test_the_sample_is_of_a_verified_bundle_and_small():
    elements = Elements(SAMPLE.read_text(encoding="utf-8"))
    assert "answers like its checkpoint." in elements.text
    assert len(elements.named("img")) > 10
    assert len(elements.named("svg")) > 5
    assert SAMPLE.stat().st_size < MAX_BYTES


def test_the_sample_names_no_place_of_the_machine_that_made_it():
    text = SAMPLE.read_text(encoding="utf-8")
    assert [place for place in ("/home/", "/root/", "/tmp/", "/Users/") if place in text] == []
