"""`fastvlm-convert run`: ask a checkpoint or a bundle."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

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
from fastvlm_convert.cli.console import print_warnings, progress, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import (
    AdapterOption,
    ProjectorOption,
    VisionTowerOption,
)
from fastvlm_convert.errors import PromptError, UsageError
from fastvlm_convert.messages import read_messages
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt import Message, marked_message

EXAMPLES = """
fastvlm-convert run FastVLM-0.5B photo.jpg "What is on the table?"
fastvlm-convert run app photo.jpg "Describe the image." --target coreml
"""

InputsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGE]... QUESTION", help="Image files, if any, then the question.", show_default=False
    ),
]
MessagesOption = Annotated[
    Path | None,
    typer.Option(
        "--messages",
        metavar="FILE.json",
        help="A conversation to go on with, in place of images and question.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class RunDocument(AnswerFacts, Document, name="run"):
    """What the model said."""


def command(
    context: typer.Context,
    model: ModelArgument,
    inputs: InputsArgument = None,
    messages: MessagesOption = None,
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
    """Ask a checkpoint or a bundle about images.

    A checkpoint runs as the PyTorch reference, a bundle in its target's runtime; off a Mac, Core ML packages
    run in an interpreter. `<image>` in the question places an image, if it stands there once for each.
    """
    flags = flags_of(context)
    conversation = with_system(_conversation(inputs, messages), system)
    with progress(flags.is_silent) as on_stage:
        loaded, notes = load_model(
            model,
            target,
            lambda share: on_stage("loading", share),
            adapter=adapter,
            projector=projector,
            vision_tower=vision_tower,
            in_turn=True,  # there is one answer
        )
    stream = loaded.reply(
        conversation, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if not flags.is_silent:
        print_warnings(notes)
    show_rest = stream_answer(stream, flags)
    report(context, "passed", RunDocument(**vars(answer_facts(loaded, stream))), show_rest)


def _conversation(inputs: list[str] | None, messages: Path | None) -> list[Message]:
    """The conversation of a file, or of a question with its images.

    Raises:
        UsageError: There are both, or neither.
        PromptError: The question is missing, or the file is malformed.
        ImageError: An image cannot be read.
    """
    if messages is not None:
        if inputs:
            raise UsageError(
                "--messages takes the place of images and question", hint="leave one of the two out"
            )
        return read_messages(messages)
    if not inputs:
        raise UsageError("missing argument 'QUESTION'", hint='add "QUESTION", or --messages FILE.json')
    *image_files, question = inputs
    if _is_file(question):
        raise PromptError(f"the last argument is a file, not a question: {question}", hint='add "QUESTION"')
    return [marked_message(question, [load_image(Path(file)) for file in image_files])]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a file name
        return False
