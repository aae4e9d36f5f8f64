"""Documents, receipts and screens, drawn by a seed, with Pillow's bundled font."""

from __future__ import annotations

from functools import cache
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from fastvlm_convert.demo.draw import Draw

Color = tuple[int, int, int]

_GOODS: Final = (
    "Bread", "Milk 1.5%", "Apples", "Olive oil", "Rice 1kg", "Tomatoes", "Coffee", "Soap", "Cheddar",
    "Batteries", "Notebook", "Orange juice", "Eggs x10", "Pasta", "Shampoo", "Bananas",
)  # fmt: skip
_SHOPS: Final = (
    "Corner Market",
    "GREEN GROCER",
    "Station Kiosk",
    "Hill & Sons",
    "Bakery No. 7",
    "City Pharmacy",
)
_NAMES: Final = ("Anna Meyer", "J. Ortega", "Li Wei", "Sam Brooks", "Priya Nair", "Tom Olsen", "Elif Kaya")
_TITLES: Final = (
    "Meeting minutes", "Terms of delivery", "Invoice", "Travel report", "Safety notice", "Chapter 3",
    "Abstract", "User manual", "Order confirmation",
)  # fmt: skip
_WORDS: Final = (
    "the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by",
    "on", "not", "he", "this", "are", "or", "his", "from", "at", "which", "but", "have", "an", "had",
    "they", "you", "were", "there", "one", "all", "we", "can", "her", "has", "been", "if", "more",
    "when", "will", "would", "who", "so", "no", "water", "time", "system", "report", "people", "market",
    "energy", "station", "value", "order", "service", "city", "process", "data", "model", "result",
    "company", "order", "number", "letter", "page", "house", "year", "month", "between", "after",
    "before", "under", "every", "first", "second", "large", "small", "new", "public", "local", "early",
    "late", "during",
)  # fmt: skip
_APPS: Final = ("Settings", "Messages", "Wallet", "Calendar", "Music", "Downloads", "Weather", "Contacts")
_ROWS: Final = (
    "Wi-Fi", "Bluetooth", "Notifications", "Display", "Storage 64 GB", "Privacy", "Language",
    "About this phone", "Battery 82 %", "Sounds", "Updates", "Accessibility",
)  # fmt: skip
_LINES: Final = (
    "See you at 8?", "On my way", "Thanks a lot!", "Where are the keys?", "Meeting moved to 14:30",
    "Happy birthday!", "Can you call me?", "The train is late", "Photo attached", "No problem",
)  # fmt: skip


def document(draw: Draw) -> tuple[Image.Image, str]:
    """A page of text in one or two columns, or with a table, as scanned."""
    width, height = (620, 800) if draw.chance(0.7) else (800, 620)
    paper, ink = _gray(draw, 235, 255), _gray(draw, 10, 70)
    page = Image.new("RGB", (width, height), paper)
    pencil = ImageDraw.Draw(page)
    size = 14 + draw.index(9)
    _write(pencil, (50, 40), draw.pick(_TITLES), 2 * size, ink)
    _write(pencil, (50, 50 + 2 * size), f"{draw.pick(_NAMES)}, {_date(draw)}", size, ink)
    columns = 1 + draw.index(2)
    column_width = (width - 60 - 40 * columns) // columns
    bottom = height - 60
    if draw.chance(0.4):
        bottom = height - 60 - 5 * 2 * size
        _table(pencil, draw, (50, bottom + size, width - 50), size, ink)
    for column in range(columns):
        _paragraphs(
            pencil, draw, (50 + column * (column_width + 40), 90 + 3 * size, column_width, bottom), size, ink
        )
    questions = (
        "What is the title of this document?",
        "Who wrote this document?",
        "Transcribe the first line.",
        "Summarize the document.",
        "What is the date?",
        "Describe the layout of the page.",
    )
    return _laid(page, draw), draw.pick(questions)


def receipt(draw: Draw) -> tuple[Image.Image, str]:
    """A till receipt on a table."""
    goods = draw.sample(_GOODS, 3 + draw.index(8))
    size = 20
    slip = Image.new("RGB", (400, 250 + 28 * len(goods)), _gray(draw, 238, 255))
    pencil, ink = ImageDraw.Draw(slip), _gray(draw, 15, 80)
    _write(pencil, (40, 24), draw.pick(_SHOPS), 30, ink)
    _write(pencil, (40, 66), f"{_date(draw)}  {draw.index(24):02d}:{draw.index(60):02d}", size, ink)
    pencil.line((30, 102, 370, 102), fill=ink, width=2)
    cents, y = 0, 114
    for good in goods:
        price = 49 + draw.index(1800)
        cents += price
        _write(pencil, (40, y), good, size, ink)
        _write(pencil, (290, y), f"{price / 100:6.2f}", size, ink)
        y += 28
    pencil.line((30, y + 6, 370, y + 6), fill=ink, width=2)
    _write(pencil, (40, y + 16), "TOTAL", 28, ink)
    _write(pencil, (260, y + 16), f"{cents / 100:6.2f}", 28, ink)
    _write(pencil, (40, y + 64), draw.pick(("Thank you!", "VAT included", "Paid by card", "CASH")), size, ink)
    questions = (
        "What is the total?",
        "How much did the first item cost?",
        "Which shop is this receipt from?",
        "List the items that were bought.",
        "When was this receipt printed?",
        "How was it paid?",
    )
    return _laid(slip, draw), draw.pick(questions)


def screen(draw: Draw) -> tuple[Image.Image, str]:
    """A screenshot of a phone: a list of settings, or a chat."""
    is_dark = draw.chance(0.4)
    ground, ink = (_gray(draw, 10, 40), (235, 235, 240)) if is_dark else (_gray(draw, 240, 255), (20, 20, 25))
    accent = (draw.index(200), draw.index(200), 60 + draw.index(190))
    picture = Image.new("RGB", (390, 760), ground)
    pencil = ImageDraw.Draw(picture)
    _write(pencil, (20, 12), f"{draw.index(24)}:{draw.index(60):02d}", 18, ink)
    _write(pencil, (300, 12), f"{1 + draw.index(100)} %", 18, ink)
    _write(pencil, (20, 52), draw.pick(_APPS), 34, ink)
    if draw.chance(0.5):
        _settings_rows(pencil, draw, ink, accent)
    else:
        _bubbles(pencil, draw, ink, accent, is_dark)
    pencil.rounded_rectangle((20, 700, 370, 745), 12, fill=accent)
    _write(pencil, (150, 711), draw.pick(("Continue", "Send", "Save", "Cancel")), 22, (255, 255, 255))
    questions = (
        "Which app is open?",
        "What does the button at the bottom say?",
        "What time does the phone show?",
        "Read the first line of the list.",
        "What can I do on this screen?",
        "Is this a dark theme?",
    )
    return picture, draw.pick(questions)


def _settings_rows(pencil: ImageDraw.ImageDraw, draw: Draw, ink: Color, accent: Color) -> None:
    for number, row in enumerate(draw.sample(_ROWS, 7)):
        top = 120 + 80 * number
        pencil.rounded_rectangle((20, top + 12, 64, top + 56), 10, fill=accent)
        _write(pencil, (82, top + 22), row, 22, ink)
        if draw.chance(0.5):
            pencil.rounded_rectangle((310, top + 20, 362, top + 48), 14, fill=accent)
            pencil.rounded_rectangle((336, top + 22, 360, top + 46), 12, fill=(250, 250, 250))
        pencil.line((82, top + 76, 370, top + 76), fill=(128, 128, 132), width=1)


def _bubbles(pencil: ImageDraw.ImageDraw, draw: Draw, ink: Color, accent: Color, is_dark: bool) -> None:
    plain = (60, 60, 66) if is_dark else (222, 222, 228)
    for number, line in enumerate(draw.sample(_LINES, 7)):
        top, width = 118 + 80 * number, 40 + _length(line, 20)
        is_mine = draw.chance(0.5)
        left = 370 - width if is_mine else 20
        pencil.rounded_rectangle((left, top, left + width, top + 54), 20, fill=accent if is_mine else plain)
        _write(pencil, (left + 20, top + 16), line, 20, (255, 255, 255) if is_mine else ink)


def _table(
    pencil: ImageDraw.ImageDraw, draw: Draw, place: tuple[int, int, int], size: int, ink: Color
) -> None:
    left, top, right = place
    for row in range(5):
        y = top + row * 2 * size
        pencil.line((left, y, right, y), fill=ink, width=1)
        if row < 4:
            cells = (draw.pick(_GOODS), str(1 + draw.index(40)), f"{draw.index(90000) / 100:.2f}")
            for column, cell in enumerate(cells):
                _write(pencil, (left + 8 + column * (right - left) // 3, y + size // 3), cell, size, ink)


def _paragraphs(
    pencil: ImageDraw.ImageDraw, draw: Draw, place: tuple[int, int, int, int], size: int, ink: Color
) -> None:
    left, top, width, bottom = place
    while top + 4 * size < bottom:
        for _ in range(2 + draw.index(5)):
            line = draw.pick(_WORDS)
            while _length(longer := f"{line} {draw.pick(_WORDS)}", size) <= width:
                line = longer
            if top + size < bottom:
                _write(pencil, (left, top), line[0].upper() + line[1:], size, ink)
            top += size * 3 // 2
        top += size


def _laid(page: Image.Image, draw: Draw) -> Image.Image:
    """A page as a camera sees it: a little turned, on a table."""
    table = (40 + draw.index(130), 30 + draw.index(110), 20 + draw.index(100))
    margin = 12 + draw.index(50)
    ground = Image.new("RGB", (page.width + 2 * margin, page.height + 2 * margin), table)
    ground.paste(page, (margin, margin))
    return ground.rotate(draw.uniform(-5, 5), Image.Resampling.BILINEAR, fillcolor=table)


def _date(draw: Draw) -> str:
    return f"{1 + draw.index(28):02d}.{1 + draw.index(12):02d}.20{10 + draw.index(20)}"


def _gray(draw: Draw, low: int, high: int) -> Color:
    value = low + draw.index(high - low + 1)
    return value, value, max(0, value - draw.index(8))


def _write(pencil: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: Color) -> None:
    """Letter by letter: neither kerning nor the text layout engine can change a picture."""
    x = place[0]
    for letter in text:
        pencil.text((x, place[1]), letter, fill=ink, font=_font(size))
        x += _advance(letter, size)


def _length(text: str, size: int) -> int:
    return sum(_advance(letter, size) for letter in text)


def _advance(letter: str, size: int) -> int:
    """Pixels from a letter to the next one."""
    share = (
        0.3
        if letter in " il.,:;'!|I"
        else 0.88
        if letter in "mwMW@%&"
        else 0.4
        if letter in "tfrj-()"
        else 0.57
    )
    return round((0.68 if letter.isupper() and letter not in "IMW" else share) * size)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
