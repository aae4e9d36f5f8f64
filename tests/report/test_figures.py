"""Figures are SVG that stands in a page: its colors, no ids twice, all numbers, the same every time."""

import re
from xml.etree import ElementTree

import pytest

from fastvlm_convert.report.figures.canvas import canvas
from fastvlm_convert.report.figures.divergence import draw_divergence
from fastvlm_convert.report.figures.heat_map import Cell, draw_grid, grids_of
from fastvlm_convert.report.figures.latency import Bar, Panel, draw_latency
from fastvlm_convert.report.figures.sizes import draw_sizes
from tests.report.pages import HOSTILE

CELLS = [
    Cell("s0b0_fc1", 71.2, False), Cell("s0b1_fc1", 64.0, False), Cell("l3_gate", 8.4, False),
    Cell("l3_up", None, True), Cell("l4_gate", None, False), Cell("logits", 44.0, False),
]  # fmt: skip
BARS = (Bar("reference", 90, 100, 130, True), Bar("int4 onnx", 60, 75, 80, False))
FIGURES = {
    "sizes": lambda: draw_sizes({"encoder": {"int8": 2.2e6, "float16": 1e5}, HOSTILE: {"int4": 1.3e6}}),
    "divergence": lambda: draw_divergence(0, "ONNX", [0.0, 1e-12, 1e-4, 0.3, 50.0]),
    "grid": lambda: draw_grid("layers-0", grids_of(CELLS)[1], "ONNX"),
    "latency": lambda: draw_latency([Panel("First token, ms", "lower", BARS)]),
}


def texts(svg: str) -> list[str]:
    return [
        element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")
    ]


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
class TestEvery:
    def test_it_is_the_same_every_time(self, draw):
        assert draw() == draw()

    def test_it_says_what_it_shows(self, draw):
        root = ElementTree.fromstring(draw())
        title, description = root[0], root[1]
        assert (title.tag[-5:], description.tag[-4:]) == ("title", "desc")
        assert root.get("aria-labelledby").split() == [title.get("id"), description.get("id")]
        assert len(description.text) > 20

    def test_its_colors_are_those_of_the_page(self, draw):
        svg = draw()
        assert "var(--" in svg
        assert "font-family" not in svg
        assert re.findall(r"(?:fill|stroke): ?#", svg) == []

    def test_what_it_refers_to_is_in_it(self, draw):
        svg = draw()
        ids = re.findall(r' id="([^"]+)"', svg)
        assert len(ids) == len(set(ids))
        assert {
            name for pair in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg) for name in pair if name
        } <= set(ids)
        assert all(name.startswith("figure-") for name in ids)


def test_operations_by_layer_and_block():
    encoder, decoder, other = grids_of(CELLS)
    assert (encoder.title, list(encoder.rows), encoder.columns) == ("encoder", ["0.0", "0.1"], ("fc1",))
    assert (decoder.title, list(decoder.rows), decoder.columns) == (
        "decoder",
        ["layer 3", "layer 4"],
        ("gate", "up"),
    )
    assert (other.title, list(other.rows)) == ("other", ["logits"])


def test_the_cells_show_figures_and_what_has_none():
    svg = FIGURES["grid"]()
    assert sorted(texts(svg)) == sorted(["8", "=", "\u2013", "layer 3", "layer 4", "gate", "up"])
    assert "level-0" in svg  # below 10 dB


def test_the_bars_of_sizes_have_their_sums():
    assert {"2.3 MB", "1.3 MB", "int8", "int4", "float16", "encoder"} <= set(texts(FIGURES["sizes"]()))


def test_more_ways_of_storage_than_colors():
    svg = draw_sizes({"decoder": {f"scheme {n}": 10.0 * n for n in range(1, 10)}})
    assert "other" in texts(svg)
    assert "450 B" in texts(svg)


def test_a_users_own_settings_of_matplotlib_change_nothing():
    import matplotlib

    before = FIGURES["latency"]()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert FIGURES["latency"]() == before
        assert matplotlib.rcParams["font.size"] == 30


def test_text_is_text_whatever_it_says():
    with canvas("x", HOSTILE, HOSTILE, 40) as drawn:
        drawn.text(0, 10, HOSTILE)
    assert ElementTree.fromstring(drawn.svg)[0].text.startswith("</style></title><script>")
    assert "<script>" not in drawn.svg
