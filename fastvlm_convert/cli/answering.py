"""What `run` and `chat` share: their options, the model, and an answer on the terminal."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.answer_stream import AnswerStream
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, waiting
from fastvlm_convert.cli.flags import Flags
from fastvlm_convert.cli.options import TARGET_NAMES, complete_target
from fastvlm_convert.errors import BundleError, PromptError, UsageError
from fastvlm_convert.manifest import FILE_NAME
from fastvlm_convert.progress import OnShare
from fastvlm_convert.prompt import Message
from fastvlm_convert.runtime.loaded import DEFAULT_NEW_TOKENS, LoadedModel, load_bundle, load_reference

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of a checkpoint or a bundle.", show_default=False)
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help=f"Longest answer in tokens; {DEFAULT_NEW_TOKENS} if omitted, or what fits the context.",
        show_default=False,
    ),
]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, metavar="T", help="0 picks the likeliest token; above 0 samples.")
]
TopPOption = Annotated[
    float,
    typer.Option(
        min=0.01, max=1.0, metavar="P", help="Sample from the likeliest tokens of this total probability."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, metavar="N", help="Random seed for sampling.")]
BundleTargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar=TARGET_NAMES,
        help="Which target of a bundle to run; its first if omitted.",
        autocompletion=complete_target,
        show_default=False,
    ),
]
SystemOption = Annotated[
    str | None,
    typer.Option(
        "--system",
        metavar="TEXT",
        help="System message, in place of the one that the model was trained with.",
        show_default=False,
    ),
]


def load_model(
    path: Path,
    target: str | None,
    on_progress: OnShare,
    *,
    adapter: Path | None = None,
    projector: Path | None = None,
    vision_tower: Path | None = None,
    in_turn: bool = False,
) -> tuple[LoadedModel, tuple[str, ...]]:
    """A checkpoint's reference, or one target of a bundle; and what the user should know of it.

    More than six parameters: all that the commands have.

    Raises:
        BundleError: `target` is not in the bundle, or an adapter or a part is given for a bundle.
        UsageError: A target is given for a checkpoint.
    """
    if not (path / FILE_NAME).is_file():
        if target is not None:
            raise UsageError(
                "--target chooses among a bundle's targets, and this is not a bundle", hint="leave it out"
            )
        checkpoint = open_checkpoint(path, adapter, projector=projector, vision_tower=vision_tower)
        return load_reference(checkpoint, on_progress=on_progress), checkpoint.notes
    if adapter is not None:
        raise BundleError(
            "an adapter can only be merged into a checkpoint", where=path, hint="export with --adapter"
        )
    if projector is not None or vision_tower is not None:
        raise BundleError(
            "a projector or an encoder can only be put into a checkpoint",
            where=path,
            hint="export with --projector or --vision-tower",
        )
    return load_bundle(path, target, in_turn=in_turn), ()


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """A conversation that begins with a system message, if one is given.

    Raises:
        PromptError: It has one already.
    """
    if system is None:
        return list(messages)
    if messages and messages[0].role == "system":
        raise PromptError("the messages bring a system message already", hint="leave --system out")
    return [Message("system", (system,)), *messages]


def stream_answer(stream: AnswerStream, flags: Flags) -> Callable[[], None]:
    """Run an answer to its end, written as it comes where a person watches; returns what writes the rest."""
    is_live = sys.stdout.isatty() and not flags.as_json
    written = 0
    with waiting("reading the prompt", flags.is_silent) as stop_waiting:
        for piece in stream:
            stop_waiting()
            if is_live and stream.answer is None:
                written += sys.stdout.write(piece)
                sys.stdout.flush()
    answer = stream.finish()

    def show_rest() -> None:
        sys.stdout.write(f"{stream.text[written:]}\n")
        if not answer.finished and not flags.quiet:
            cut = answer.timings.answer_tokens
            err.print(f"[yellow]warning:[/] the answer was cut at {cut} tokens (--max-new-tokens)")

    return show_rest


@dataclass(frozen=True)
class TimingFacts:
    """Where the time of an answer went; see `Timings`.

    Attributes:
        decode_tokens_per_s: Speed after the first token, or None when there was only one.
    """

    vision_s: float
    prefill_s: float
    decode_s: float
    ttft_s: float
    prompt_tokens: int
    answer_tokens: int
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class AnswerFacts:
    """An answer, in documents.

    Attributes:
        text: The answer.
        token_ids: Its tokens.
        finished: Whether the model ended it.
        executed_by: What executed the model.
        encoded_images: Images that were encoded for it; 0 where they were known from earlier answers.
        cached_tokens: Tokens of the prompt that were not read again.
        timings: Where the time went.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    executed_by: str
    encoded_images: int
    cached_tokens: int
    timings: TimingFacts


def answer_facts(loaded: LoadedModel, stream: AnswerStream) -> AnswerFacts:
    """An answer that has come to its end, for documents."""
    answer = stream.finish()
    timings = answer.timings
    return AnswerFacts(
        text=stream.text,
        token_ids=tuple(answer.token_ids),
        finished=answer.finished,
        executed_by=loaded.session.executed_by,
        encoded_images=answer.encoded_images,
        cached_tokens=answer.cached_tokens,
        timings=TimingFacts(**asdict(timings), decode_tokens_per_s=timings.decode_tokens_per_s),
    )
