"""`fastvlm-convert chat`: a conversation with a checkpoint or a bundle."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
from PIL import Image

from fastvlm_convert.answer_stream import AnswerStream
from fastvlm_convert.cli.answering import (
    AnswerFacts,
    BundleTargetOption,
    MaxNewTokensOption,
    ModelArgument,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopPOption,
    answer_facts,
    load_model,
    stream_answer,
    with_system,
)
from fastvlm_convert.cli.console import err, print_error, print_warnings, progress, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import (
    AdapterOption,
    ProjectorOption,
    VisionTowerOption,
)
from fastvlm_convert.errors import ConversionError, UsageError
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt import Message, user_message

EXAMPLES = """
fastvlm-convert chat FastVLM-0.5B photo.jpg
fastvlm-convert chat app --target coreml --system "Answer in one sentence."
"""
_HELP: Final = "/image FILE adds an image to the next message, /reset starts over, /quit ends"

ImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[IMAGE]...", help="Images of the first message, if any.", show_default=False),
]


@dataclass(frozen=True)
class Turn(AnswerFacts):
    """A message, and what the model said to it."""

    question: str


@dataclass(frozen=True)
class ChatDocument(Document, name="chat"):
    """A conversation, turn by turn."""

    turns: tuple[Turn, ...]


def command(
    context: typer.Context,
    model: ModelArgument,
    images: ImagesArgument = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    target: BundleTargetOption = None,
    adapter: AdapterOption = None,
    projector: ProjectorOption = None,
    vision_tower: VisionTowerOption = None,
) -> None:
    """Talk with a checkpoint or a bundle about images.

    One message a line, from the terminal or from standard input. /image FILE adds an image to the next
    message, /reset starts over, /quit or the end of the input ends.
    """
    flags = flags_of(context)
    pending = [load_image(path) for path in images or ()]
    with progress(flags.is_silent) as on_stage:
        loaded, notes = load_model(
            model,
            target,
            lambda share: on_stage("loading", share),
            adapter=adapter,
            projector=projector,
            vision_tower=vision_tower,
        )
    is_watched = sys.stdin.isatty()
    if not flags.is_silent:
        print_warnings(notes)
        if is_watched:
            err.print(_HELP)
    reply = partial(
        loaded.reply, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    talk = _Conversation(reply, system, pending)
    turns: list[Turn] = []
    for line in _lines(is_watched):
        if line == "/quit":
            break
        try:
            stream = talk.take(line)
            if stream is not None:
                show_rest = stream_answer(stream, flags)
                talk.keep(stream.text)
                turns.append(Turn(**vars(answer_facts(loaded, stream)), question=line))
                if not flags.as_json:
                    show_rest()
        except ConversionError as error:
            if not is_watched:  # a script wants to know
                raise
            talk.forget_unanswered()
            print_error(error)
    report(context, "passed", ChatDocument(tuple(turns)), lambda: None)


class _Conversation:
    """The messages so far; the model itself knows what it has read of them already.

    Args:
        reply: Answers messages.
        system: The system message, or None for the model's own.
        pending: Pictures of the next message.
    """

    def __init__(
        self,
        reply: Callable[..., AnswerStream],
        system: str | None,
        pending: list[Image.Image],
    ) -> None:
        self._reply = reply
        self._system = system
        self._pending = pending
        self._messages: list[Message] = []

    def take(self, line: str) -> AnswerStream | None:
        """Do what a line says; the beginning of the answer where it is a message.

        Raises:
            UsageError: It is a command that there is not.
            ImageError: The image that it names cannot be read.
            PromptError: The conversation is too long.
        """
        if line == "/reset":
            self._messages, self._pending = [], []
            return None
        if line.startswith("/image "):
            path = Path(line.removeprefix("/image ").strip()).expanduser()
            self._pending.append(load_image(path))
            return None
        if line.startswith("/"):
            raise UsageError(f"unknown command '{line.split()[0]}'", hint=_HELP)
        self._messages.append(user_message(line, self._pending))
        self._pending = []
        return self._reply(with_system(self._messages, self._system))

    def keep(self, answer: str) -> None:
        """Remember the answer to the last message."""
        self._messages.append(Message("assistant", (answer,)))

    def forget_unanswered(self) -> None:
        """Take back a last message that got no answer."""
        if self._messages and self._messages[-1].role == "user":
            self._messages.pop()


def _lines(is_watched: bool) -> Iterator[str]:
    """Messages as they are typed; empty lines are passed over."""
    while True:
        try:
            line = input("> ") if is_watched else sys.stdin.readline()
        except EOFError:
            return
        if not is_watched and not line:
            return
        if line.strip():
            yield line.strip()
