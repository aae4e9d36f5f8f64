"""`fastvlm-convert bundle vectors`: what a bundle computes, for the unit tests of apps."""

from dataclasses import dataclass

import typer

from fastvlm_convert.bundle.vectors import golden_vectors
from fastvlm_convert.cli.answering import BundleTargetOption
from fastvlm_convert.cli.bundle.arguments import BundleArgument
from fastvlm_convert.cli.console import progress, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.output_file import (
    OutputFileOption,
    OverwriteFileOption,
    check_output_file,
    write_output_file,
)
from fastvlm_convert.manifest import chosen_target, load_manifest
from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.targets import Target

EXAMPLES = """
fastvlm-convert bundle vectors app -o vectors.json
fastvlm-convert bundle vectors app --target coreml -o vectors.json
"""


@dataclass(frozen=True)
class VectorsDocument(Document, name="bundle-vectors"):
    """Golden vectors that were written.

    Attributes:
        bundle: The bundle's folder.
        target: Which of its targets computed them.
        executed_by: What executed it.
        answers: By picture.
        output: The file.
    """

    bundle: str
    target: Target
    executed_by: str
    answers: dict[str, str]
    output: str


def command(
    context: typer.Context,
    bundle: BundleArgument,
    output: OutputFileOption,
    target: BundleTargetOption = None,
    overwrite: OverwriteFileOption = False,
) -> None:
    """Write what a bundle computes, for the tests of apps.

    Three pictures with their pixels, token ids, first logits and answers, as JSON: an app's own code must
    come to the same.
    """
    chosen = chosen_target(load_manifest(bundle), target, bundle)
    check_output_file(output, bundle, overwrite)
    with progress(flags_of(context).is_silent) as on_stage:
        model = load_bundle(bundle, chosen)
        vectors = golden_vectors(bundle, chosen, model, lambda share: on_stage("pictures", share))
    write_output_file(output, vectors.to_json())
    document = VectorsDocument(
        bundle=str(bundle),
        target=vectors.target,
        executed_by=vectors.executed_by,
        answers={case.name: case.text for case in vectors.cases},
        output=str(output),
    )

    def show() -> None:
        for case in vectors.cases:
            typer.echo(f"{case.name}: {case.question} {case.text}")
        typer.echo(f"wrote {output}")

    report(context, "passed", document, show, brief=str(output))
