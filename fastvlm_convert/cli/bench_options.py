"""The options of `fastvlm-convert bench`."""

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.bench.request import DEFAULT_REGRESSION

BundlesArgument = Annotated[
    list[Path] | None, typer.Argument(metavar="BUNDLE...", help="Folders of bundles.", show_default=False)
]
ReferenceOption = Annotated[
    Path | None,
    typer.Option(
        metavar="CHECKPOINT", help="Also run this checkpoint as the PyTorch reference.", show_default=False
    ),
]
NewTokensOption = Annotated[int, typer.Option(min=2, metavar="N", help="Length of every answer in tokens.")]
TrialsOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Rounds to measure, after one to warm up.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Threads of every runtime; one for each core by default.",
        show_default=False,
    ),
]
ImportOption = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="[STAGE=]FILE",
        help="Show figures that another tool measured; STAGE is vision, prefill or decode.",
        show_default=False,
    ),
]
MeasuredOnOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="Device of imported files that do not say.", show_default=False),
]
SaveBaselineOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the result for --against; replaces one.", show_default=False),
]
AgainstOption = Annotated[
    Path | None,
    typer.Option(
        metavar="BUNDLE|FILE",
        help="Compare with a bundle, measured in the same rounds, or with a saved result.",
        show_default=False,
    ),
]
MaxRegressionOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="PERCENT",
        help=f"How much slower than --against is allowed; {DEFAULT_REGRESSION:g} by default.",
        show_default=False,
    ),
]
AnyMachineOption = Annotated[
    bool, typer.Option("--any-machine", help="Compare with a result of another machine.")
]
