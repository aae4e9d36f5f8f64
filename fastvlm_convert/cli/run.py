"""`fastvlm-convert run`: ask a checkpoint or a bundle."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, progress, report, waiting
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import TARGET_NAMES, AdapterOption, complete_target
from fastvlm_convert.errors import BundleError, PromptError, UsageError, did_you_mean
from fastvlm_convert.generate import Answer
from fastvlm_convert.manifest import FILE_NAME, load_manifest
from fastvlm_convert.pictures import load_image
from fastvlm_convert.progress import OnShare
from fastvlm_convert.prompt import marked_message
from fastvlm_convert.runtime.loaded import DEFAULT_NEW_TOKENS, LoadedModel, load_bundle, load_reference

EXAMPLES = """
fastvlm-convert run FastVLM-0.5B photo.jpg "What is on the table?"
fastvlm-convert run app photo.jpg "Describe the image." --target coreml
"""

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of a checkpoint or a bundle.", show_default=False)
]
InputsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="[IMAGE]... QUESTION", help="Image files, if any, then the question.", show_default=False
    ),
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


def command(
    context: typer.Context,
    model: ModelArgument,
    inputs: InputsArgument,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    target: BundleTargetOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Ask a checkpoint or a bundle about images.

    A checkpoint runs as the PyTorch reference, a bundle in its target's runtime; off a Mac, Core ML packages
    run in an interpreter.
    """
    flags = flags_of(context)
    *image_files, question = inputs
    if _is_file(question):
        raise PromptError(f"the last argument is a file, not a question: {question}", hint='add "QUESTION"')
    images = [load_image(Path(file)) for file in image_files]
    with progress(flags.is_silent) as on_stage:
        loaded = load_model(model, target, adapter, lambda share: on_stage("loading", share))
    message = marked_message(question, images)
    stream = loaded.reply(
        [message], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    is_live = sys.stdout.isatty() and not flags.as_json
    written = 0
    with waiting("reading the prompt", flags.is_silent) as stop_waiting:
        for piece in stream:
            stop_waiting()
            if is_live and stream.answer is None:
                written += sys.stdout.write(piece)
                sys.stdout.flush()
    answer = stream.finish()

    def show() -> None:
        sys.stdout.write(f"{stream.text[written:]}\n")
        if not answer.finished and not flags.quiet:
            cut = answer.timings.answer_tokens
            err.print(f"[yellow]warning:[/] the answer was cut at {cut} tokens (--max-new-tokens)")

    report(context, "passed", _document(loaded, answer, stream.text), show)


def load_model(path: Path, target: str | None, adapter: Path | None, on_progress: OnShare) -> LoadedModel:
    """A checkpoint's reference, or one target of a bundle.

    Raises:
        BundleError: `target` is not in the bundle, or an adapter is given for a bundle.
        UsageError: A target is given for a checkpoint.
    """
    if not (path / FILE_NAME).is_file():
        if target is not None:
            raise UsageError(
                "--target chooses among a bundle's targets, and this is not a bundle", hint="leave it out"
            )
        return load_reference(open_checkpoint(path, adapter), on_progress=on_progress)
    if adapter is not None:
        raise BundleError(
            "an adapter can only be merged into a checkpoint", where=path, hint="export with --adapter"
        )
    manifest = load_manifest(path)
    if target is not None and target not in manifest.targets:
        raise BundleError(
            f"the bundle has no target '{target}'",
            where=path,
            hint=f"{did_you_mean(target, manifest.targets)}it has {', '.join(manifest.targets)}",
        )
    return load_bundle(path, manifest, target or manifest.targets[0])


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a file name
        return False


def _document(loaded: LoadedModel, answer: Answer, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "token_ids": list(answer.token_ids),
        "finished": answer.finished,
        "executed_by": loaded.session.executed_by,
        "timings": {**vars(answer.timings), "decode_tokens_per_s": answer.timings.decode_tokens_per_s},
    }
