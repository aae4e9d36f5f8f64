"""Questions about a board and their answers, one function per kind."""

from __future__ import annotations

from collections.abc import Callable

from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.questions import Question
from unseen.board import INSTRUMENTS, NUMBERS, ORDINALS, Board, Strip

Pair = tuple[str, str]
Asker = Callable[[Board, Draw], Pair | None]
_TIMES = ("", "once", "twice", "three times", "four times")


def _content(board: Board, draw: Draw) -> Pair:
    row = draw.index(len(board.strips))
    return f"Tell me about row {NUMBERS[row]}.", _sentence(board.strips[row])


def _find(board: Board, draw: Draw) -> Pair:
    name = draw.pick(INSTRUMENTS)
    row = board.row_of(name)
    return f"Which row has the {name}?", "No row has it." if row is None else f"Row {NUMBERS[row]} has it."


def _about(instrument: str, questions: tuple[str, ...]) -> Asker:
    def ask_about(board: Board, draw: Draw) -> Pair | None:
        row = board.row_of(instrument)
        return None if row is None else (draw.pick(questions), _sentence(board.strips[row]))

    return ask_about


def _chart(board: Board, draw: Draw) -> Pair | None:
    row = board.row_of("chart")
    if row is None:
        return None
    heights = [NUMBERS.index(height) for height in board.strips[row].facts]
    wanted, verb = draw.pick(((3, "tallest"), (0, "shortest")))
    return f"Which bar is {verb}?", f"The {ORDINALS[heights.index(wanted)]} bar is {verb}."


def _above(board: Board, draw: Draw) -> Pair:
    first, second = draw.sample(range(len(board.strips)), 2)
    names = board.strips[first].instrument, board.strips[second].instrument
    answer = "Yes, it is above." if first < second else "No, it is below."
    return f"Is the {names[0]} higher up than the {names[1]}?", answer


def _order(board: Board, draw: Draw) -> Pair:
    names = [strip.instrument for strip in board.strips]
    if draw.chance(0.5):
        return "List all rows going down.", ", ".join(names) + "."
    return "List all rows going up.", ", ".join(reversed(names)) + "."


def _report(board: Board, draw: Draw) -> Pair:
    listed = " ".join(f"Row {NUMBERS[n]}: {_sentence(strip)}" for n, strip in enumerate(board.strips))
    return draw.pick(("Write a full report.", "Report everything on this board.")), listed


def _sentence(strip: Strip) -> str:
    facts = strip.facts
    present = [fact for fact in facts if fact]
    if strip.instrument == "word":
        return f"It reads {''.join(facts)}."
    if strip.instrument == "chart":
        return f"Bars of {', '.join(facts)}."
    if strip.instrument == "dial":
        return f"The needle points {present[0]}."
    if strip.instrument == "cloth":
        return f"The cloth has {facts[1]} {facts[0]}."
    if strip.instrument == "icons":
        return f"A {present[0]}, {_TIMES[len(present)]}."
    return f"The curve {facts[0]}."


ASKERS: dict[str, Asker] = {
    "content": _content,
    "find": _find,
    "word": _about("word", ("Read the word.", "Spell the word for me.")),
    "chart": _chart,
    "bars": _about("chart", ("Give the height of each bar.", "Read the chart.")),
    "dial": _about("dial", ("Where does the needle point?", "Read the dial.")),
    "cloth": _about("cloth", ("Of what kind is the cloth?", "Tell me about the cloth.")),
    "icons": _about("icons", ("Count the icons.", "Which icons do you find?")),
    "curve": _about("curve", ("What does the curve do?", "Read the curve.")),
    "above": _above,
    "order": _order,
    "report": _report,
}
KINDS = tuple(ASKERS)


def ask(board: Board, kind: str, draw: Draw) -> Question | None:
    """A question of one kind, or None if the board has nothing to ask it about."""
    pair = ASKERS[kind](board, draw)
    return None if pair is None else Question(kind, *pair)
