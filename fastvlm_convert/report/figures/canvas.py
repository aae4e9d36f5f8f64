"""A place to draw on with matplotlib, and the SVG that comes out: small, and the same every time.

Matplotlib draws in fixed colors, but a page is light, dark or printed. So figures are drawn in placeholder
colors, which become variables of the page's style sheet.
"""

import io
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from markupsafe import Markup

from fastvlm_convert.errors import MissingDependencyError, printable, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH: Final = 360.0  # CSS pixels: what a phone shows without scaling
FONT_SIZE: Final = 11.0

# Placeholders and the variables that they become.
INK: Final = "#010101"
MUTED: Final = "#020202"
RULE: Final = "#030303"
PAPER: Final = "#040404"
ACCENT: Final = "#050505"
BAD: Final = "#060606"
SERIES: Final = ("#110101", "#110202", "#110303", "#110404", "#110505", "#110606")
LEVELS: Final = ("#220101", "#220202", "#220303", "#220404", "#220505", "#220606", "#220707")
LEVEL_INKS: Final = ("#330101", "#330202", "#330303", "#330404", "#330505", "#330606", "#330707")

_VARIABLES: Final = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    ACCENT: "accent",
    BAD: "bad",
    **{color: f"series-{n}" for n, color in enumerate(SERIES)},
    **{color: f"level-{n}" for n, color in enumerate(LEVELS)},
    **{color: f"level-ink-{n}" for n, color in enumerate(LEVEL_INKS)},
}
_SVG: Final = "http://www.w3.org/2000/svg"
_LINK: Final = "{http://www.w3.org/1999/xlink}href"
_USED: Final = re.compile(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"')
_SETTINGS: Final[Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": FONT_SIZE,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass
class Canvas:
    """A figure under construction, measured in CSS pixels from its upper left corner.

    Attributes:
        figure: Matplotlib's.
        width: Of all.
        height: Of all.
        svg: The markup; empty until the canvas is closed.
    """

    figure: "Figure"
    width: float
    height: float
    svg: Markup = field(default_factory=Markup)

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        """Axes without a frame in a rectangle."""
        bottom = self.height - top - height
        sides = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(sides)
        axes.spines[:].set_visible(False)
        axes.patch.set_visible(False)
        axes.tick_params(length=0)
        return axes

    def text(self, x: float, y: float, text: str, **look: Any) -> None:  # noqa: ANN401
        """Text with its baseline at a place."""
        self.figure.text(x / self.width, 1 - y / self.height, label(text), **look)


@contextmanager
def canvas(name: str, title: str, description: str, height: float, width: float = WIDTH) -> Iterator[Canvas]:
    """A canvas, whose `svg` is there when the block ends.

    Args:
        name: Of the figure, unlike that of any other on the page.
        title: What it shows.
        description: What there is to see, for those who do not see it.
        height: In CSS pixels.
        width: The same.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "drawing a report") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user has set for other figures
        matplotlib.rcParams.update(_SETTINGS | {"svg.hashsalt": name})
        drawn = Canvas(Figure(figsize=(width / 72, height / 72), dpi=72), width, height)
        drawn.figure.patch.set_visible(False)
        FigureCanvasSVG(drawn.figure)
        yield drawn
        file = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawn.figure.savefig(file, format="svg", metadata=nothing)
    drawn.svg = _for_page(file.getvalue(), f"figure-{name}", title, description)


def label(text: str, limit: int = 60) -> str:
    """Text of whatever origin as a figure can show it: one line, not too long."""
    return shortened(printable(text), limit)


def _for_page(svg: bytes, name: str, title: str, description: str) -> Markup:
    """What matplotlib wrote, made a part of a page: its names are its own, its colors the page's."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(svg)
    for tag in ("metadata", "defs"):
        for element in root.findall(f"{{{_SVG}}}{tag}"):
            if tag == "metadata" or element.find(f"{{{_SVG}}}style") is not None:
                root.remove(element)
    used = {name for names in _USED.findall(svg.decode()) for name in names}
    for element in root.iter():
        _adopt(element, name, used)
    _unwrap(root)
    box = root.get("viewBox", "0 0 0 0").split()
    root.attrib.update(
        {"width": box[2], "height": box[3], "role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    )
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = printable(text)
        root.insert(position, element)
    # Written by a library that escapes, and read back and written again by another.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _adopt(element: ElementTree.Element, name: str, used: Collection[str]) -> None:
    given = element.attrib.pop("id", None)
    if given in used:
        element.set("id", f"{name}-{given}")
    if _LINK in element.attrib:
        element.set("href", f"#{name}-{element.attrib.pop(_LINK)[1:]}")
    for key, value in list(element.attrib.items()):
        if "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))
    if element.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
        del element.attrib["transform"]
    if "d" in element.attrib:
        element.set("d", " ".join(element.attrib["d"].split()))
    style = element.get("style")
    if style is not None:
        style = re.sub(r"#[0-9a-f]{6}", lambda m: f"var(--{_VARIABLES.get(m[0], 'ink')})", style)
        style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", style)  # the family is the page's
        element.set("style", re.sub(r"font-family: [^;]*;? ?", "", style))


def _unwrap(element: ElementTree.Element) -> None:
    """Put the content of groups that say nothing in their places: half of the bytes of a figure."""
    children: list[ElementTree.Element] = []
    for child in element:
        _unwrap(child)
        children.extend(child if child.tag == f"{{{_SVG}}}g" and not child.attrib else [child])
    element[:] = children
    for node in children:
        node.tail = None
    if children:
        element.text = None
