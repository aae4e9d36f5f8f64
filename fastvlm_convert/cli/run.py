"""`fastvlm-convert run`: ask a checkpoint or a bundle."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, print_json, progress, waiting
from fastvlm_convert.cli.options import AdapterOption, JsonOption, VerboseOption
from fastvlm_convert.errors import BundleError, PromptError
from fastvlm_convert.generate import Answer
from fastvlm_convert.manifest import FILE_NAME
from fastvlm_convert.preprocess import load_image
from fastvlm_convert.progress import OnShare
from fastvlm_convert.runtime.loaded import DEFAULT_NEW_TOKENS, LoadedModel, load_bundle, load_reference


def command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a checkpoint or a bundle.", show_default=False)
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="[IMAGE]... QUESTION",
            help="Image files, possibly none, then the question.",
            show_default=False,
        ),
    ],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Most tokens to answer with ({DEFAULT_NEW_TOKENS}, or what fits).",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above 0 samples.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Sample from this share of probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    target: Annotated[
        str | None, typer.Option(help="Which of a bundle's targets to run.", show_default=False)
    ] = None,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer a question about images, from the PyTorch reference of a checkpoint or from a bundle."""
    *image_files, question = inputs
    if _is_file(question):
        raise PromptError(f"the last argument is a file, not a question: {question}", hint='add "QUESTION"')
    images = [load_image(Path(file)) for file in image_files]
    with progress(quiet=as_json) as on_stage:
        loaded = load_model(model, target, adapter, lambda share: on_stage("loading", share))
    stream = loaded.ask(
        images, question, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    is_live = sys.stdout.isatty() and not as_json
    written = 0
    with waiting("reading the prompt", quiet=as_json) as stop_waiting:
        for piece in stream:
            stop_waiting()
            if is_live and stream.answer is None:
                written += sys.stdout.write(piece)
                sys.stdout.flush()
    answer = stream.finish()
    if as_json:
        _print_document(loaded, answer, stream.text)
        return
    sys.stdout.write(f"{stream.text[written:]}\n")
    if not answer.finished:
        cut = answer.timings.answer_tokens
        err.print(f"[yellow]warning:[/] the answer was cut at {cut} tokens (--max-new-tokens)")


def load_model(path: Path, target: str | None, adapter: Path | None, on_progress: OnShare) -> LoadedModel:
    """A checkpoint's reference, or one target of a bundle.

    Raises:
        BundleError: `target` is not in the bundle, or an adapter is given for a bundle.
        PromptError: A target is given for a checkpoint.
    """
    if not (path / FILE_NAME).is_file():
        if target is not None:
            raise PromptError(
                "--target chooses among a bundle's targets; this is no bundle", hint="leave it out"
            )
        return load_reference(open_checkpoint(path, adapter), on_progress=on_progress)
    if adapter is not None:
        raise BundleError(
            "an adapter can only be merged into a checkpoint", where=path, hint="export with --adapter"
        )
    return load_bundle(path, target)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a file name
        return False


def _print_document(loaded: LoadedModel, answer: Answer, text: str) -> None:
    print_json(
        "run",
        "passed",
        text=text,
        token_ids=list(answer.token_ids),
        finished=answer.finished,
        executed_by=loaded.session.executed_by,
        timings={**vars(answer.timings), "decode_tokens_per_s": answer.timings.decode_tokens_per_s},
    )
