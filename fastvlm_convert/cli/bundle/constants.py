"""`fastvlm-convert bundle constants`: what an app must know of a bundle, as source code."""

from dataclasses import dataclass
from typing import Annotated

import typer

from fastvlm_convert.bundle.constants.contract import client_contract
from fastvlm_convert.bundle.constants.languages import LANGUAGES, known_language, render_constants
from fastvlm_convert.cli.answering import BundleTargetOption
from fastvlm_convert.cli.bundle.arguments import BundleArgument
from fastvlm_convert.cli.console import report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.output_file import (
    OutputFileOption,
    OverwriteFileOption,
    check_output_file,
    write_output_file,
)
from fastvlm_convert.manifest import chosen_target, load_manifest, manifest_sha256
from fastvlm_convert.targets import Target

EXAMPLES = """
fastvlm-convert bundle constants app --language kotlin -o BundleConstants.kt
fastvlm-convert bundle constants app --language javascript -o constants.mjs
"""


@dataclass(frozen=True)
class ConstantsDocument(Document, name="bundle-constants"):
    """Source code that was written.

    Attributes:
        bundle: The bundle's folder.
        target: Which of its targets it is for.
        output: The file.
    """

    bundle: str
    target: Target
    output: str


def command(
    context: typer.Context,
    bundle: BundleArgument,
    language: Annotated[
        str,
        typer.Option(
            "--language",
            metavar="|".join(LANGUAGES),
            help="Language of the file.",
            autocompletion=lambda incomplete: [name for name in LANGUAGES if name.startswith(incomplete)],
            show_default=False,
        ),
    ],
    output: OutputFileOption,
    target: BundleTargetOption = None,
    overwrite: OverwriteFileOption = False,
) -> None:
    """Write what an app must know of a bundle as source code.

    Names, shapes and dtypes of the graphs' inputs and outputs, the layout of the cache, the texts of the
    prompt, token ids and how pictures are prepared.
    """
    known_language(language)
    manifest = load_manifest(bundle)
    contract = client_contract(manifest, manifest_sha256(bundle), chosen_target(manifest, target, bundle))
    check_output_file(output, bundle, overwrite)
    write_output_file(output, render_constants(contract, language))
    document = ConstantsDocument(str(bundle), contract.target, str(output))
    report(context, "passed", document, lambda: typer.echo(f"wrote {output}"), brief=str(output))
