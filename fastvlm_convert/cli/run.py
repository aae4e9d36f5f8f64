"""`fastvlm-convert run`: ask a checkpoint or a bundle."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, print_json, progress, waiting
from fastvlm_convert.cli.options import AdapterOption, JsonOption, VerboseOption
from fastvlm_convert.errors import BundleError, PromptError
from fastvlm_convert.generate import Answer, generate, greedy, sampler
from fastvlm_convert.manifest import FILE_NAME, load_manifest
from fastvlm_convert.pictures import load_image
from fastvlm_convert.progress import OnShare
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle, load_reference

DEFAULT_NEW_TOKENS = 256


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
    prompt = loaded.prompt(question, images)
    session = loaded.session
    if max_new_tokens is None:
        left = session.context_length - prompt.length(session.num_image_tokens)
        max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, left))
    streamer = _Streamer(loaded) if sys.stdout.isatty() and not as_json else None
    with waiting("reading the prompt", quiet=as_json) as stop_waiting:

        def on_token(token: int) -> None:
            stop_waiting()
            if streamer is not None:
                streamer.add(token)

        answer = generate(
            session,
            prompt,
            loaded.eos_token_ids,
            max_new_tokens,
            greedy if temperature == 0 else sampler(temperature, top_p, seed),
            on_token,
        )
    text = loaded.tokenizer.decode(list(answer.token_ids))
    if as_json:
        _print_document(loaded, answer, text)
        return
    sys.stdout.write(f"{text if streamer is None else text[streamer.written :]}\n")
    if not answer.finished:
        err.print(f"[yellow]warning:[/] the answer was cut at {max_new_tokens} tokens (--max-new-tokens)")


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
    manifest = load_manifest(path)
    if target is not None and target not in manifest.targets:
        raise BundleError(
            f"the bundle has no target '{target}'", where=path, hint=f"it has {', '.join(manifest.targets)}"
        )
    return load_bundle(path, manifest, target or manifest.targets[0])


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a file name
        return False


class _Streamer:
    """Writes an answer to the terminal as it comes; `written` characters of it are there."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._tokenizer = loaded.tokenizer
        self._ids: list[int] = []
        self.written = 0

    def add(self, token: int) -> None:
        """Write what the new token adds; half a character waits for its other half."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[self.written :])
            sys.stdout.flush()
            self.written = len(text)


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
