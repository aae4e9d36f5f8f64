"""`fastvlm-convert bundle sign`: sign a bundle with a key of one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.cli.console import out, progress, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import BundleArgument
from fastvlm_convert.delivery.check import require_sound
from fastvlm_convert.delivery.signature import sign_bundle

EXAMPLES = """
fastvlm-convert bundle sign app --key key.pem
fastvlm-convert bundle sign app --key key.pem --json
"""


@dataclass(frozen=True)
class SignDocument(Document, name="bundle-sign"):
    """A signature that was written.

    Attributes:
        bundle: The bundle's folder.
        signature: The signature's file.
    """

    bundle: str
    signature: str


def command(
    context: typer.Context,
    bundle: BundleArgument,
    key: Annotated[
        Path,
        typer.Option(
            "--key", metavar="FILE", help="Private key (elliptic curve) in PEM.", show_default=False
        ),
    ],
) -> None:
    """Sign a bundle: writes model.sig into it.

    Every file is checked first. The signature covers all but itself and verification.json, and can be checked
    with `bundle check --signature` or with the model-signing library alone.
    """
    with progress(flags_of(context).is_silent) as on_stage:
        require_sound(bundle, on_stage)
    path = sign_bundle(bundle, key)
    document = SignDocument(str(bundle), str(path))
    report(
        context,
        "passed",
        document,
        lambda: out.print(f"signed: {path}", markup=False, soft_wrap=True),
        brief=str(path),
    )
