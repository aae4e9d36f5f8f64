"""Results in files: what a later run is compared with."""

import dataclasses
import json
import math
from dataclasses import astuple
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.bench.result import KNOWN, BenchResult, ContenderResult, spreads_of
from fastvlm_convert.dataclass_io import from_plain, has_schema
from fastvlm_convert.errors import BenchmarkError, OutputError, RecipeError, shown
from fastvlm_convert.json_file import parse_json
from fastvlm_convert.manifest import is_bundle
from fastvlm_convert.regular_file import read_text

SCHEMA: Final = "fastvlm-convert/bench"
SCHEMA_VERSION: Final = 1
_MAX_BYTES: Final = 16 << 20
_ENVELOPE: Final = ("command", "status")  # of what --json prints, which is a result too
_AGAIN: Final = "make it again with --save-baseline"


def check_writable(path: Path) -> None:
    """See that a result can be written to a path, before the minutes that measuring takes.

    Raises:
        OutputError: It is a folder, in no folder, in a bundle, or a file that is no result.
    """
    if any(is_bundle(folder) for folder in path.resolve().parents):
        what = "a bundle holds the files that its manifest lists, and no others"
        raise OutputError(what, where=path, hint="write it beside the bundle")
    if path.is_dir():
        raise OutputError("the baseline is a folder", where=path, hint="give the name of a file")
    if not path.parent.is_dir():
        raise OutputError("there is no such folder", where=path.parent, hint="make it first")
    if path.exists() and not has_schema(path, SCHEMA):
        raise OutputError("the file is no result of bench", where=path, hint="choose another name")


def save_result(path: Path, result: BenchResult) -> None:
    """Write a result; an earlier one is replaced.

    Raises:
        OutputError: It cannot be written.
    """
    value = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(result)}
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        hint = "see that there is room and that you may write there"
        raise OutputError(f"cannot write: {error.strerror}", where=path, hint=hint) from error


def load_result(path: Path) -> BenchResult:
    """Read what `--save-baseline` wrote or `--json` printed.

    Raises:
        BenchmarkError: It cannot be read, or is damaged.
    """
    return parse_result(path, read_json(path, _MAX_BYTES))


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file of figures.

    Raises:
        BenchmarkError: It cannot be read, or is none.
    """
    try:
        value = parse_json(read_text(path, max_bytes))
    except OSError as error:
        raise BenchmarkError(f"cannot read: {error.strerror}", where=path) from error
    except ValueError as error:
        raise BenchmarkError(f"not valid JSON: {error}", where=path) from error
    if not isinstance(value, dict):
        raise BenchmarkError(f"the file holds {shown(value)}, expected an object", where=path)
    return value


def parse_result(path: Path, value: dict[str, Any]) -> BenchResult:
    """A result from the JSON of a file.

    Args:
        path: The file, for messages.
        value: What is in it.

    Raises:
        BenchmarkError: It is damaged, or of another version.
    """
    if value.get("schema") != SCHEMA:
        raise BenchmarkError("no result of fastvlm-convert bench", where=path, hint=_AGAIN)
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        what = f"result version {shown(version)}; this tool reads {SCHEMA_VERSION}"
        raise BenchmarkError(what, where=path, hint=_AGAIN)
    head = ("schema", "schema_version", *_ENVELOPE)
    try:
        result = from_plain(BenchResult, {key: inner for key, inner in value.items() if key not in head})
    except RecipeError as error:
        raise BenchmarkError(f"damaged: {error.args[0]}", where=path, hint=error.given_hint) from error
    _check(path, result)
    return result


def check_samples(path: Path, samples: dict[str, tuple[float, ...]], owner: str) -> None:
    """See that figures are of metrics that there are, and are numbers above 0.

    Raises:
        BenchmarkError: Names the first that is not.
    """
    for metric, values in samples.items():
        if metric not in KNOWN:
            known = ", ".join(KNOWN)
            what = f"unknown metric {shown(metric)} of {shown(owner)}"
            raise BenchmarkError(what, where=path, hint=f"known: {known}")
        if not values:
            raise BenchmarkError(f"{metric} of {shown(owner)} has no samples", where=path)
        for number, value in enumerate(values):
            if not (math.isfinite(value) and value > 0):
                what = f"{metric}[{number}] of {shown(owner)} is {value}, expected a number above 0"
                raise BenchmarkError(what, where=path)


def _check(path: Path, result: BenchResult) -> None:
    if not result.contenders:
        raise BenchmarkError("damaged: it has no contenders", where=path, hint=_AGAIN)
    names = [c.name for c in result.contenders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BenchmarkError(f"damaged: {shown(twice)} is there twice", where=path, hint=_AGAIN)
    for contender in result.contenders:
        check_samples(path, contender.samples, contender.name)
        _check_rounds(path, result, contender)
        if not _follows(contender):
            what = f"damaged: metrics of {shown(contender.name)} do not follow from its samples"
            raise BenchmarkError(what, where=path, hint=_AGAIN)
    if result.settings is not None:
        for value in result.settings.calibration_ms:
            if not (math.isfinite(value) and value > 0):
                raise BenchmarkError(f"damaged: calibration_ms holds {value}", where=path, hint=_AGAIN)


def _check_rounds(path: Path, result: BenchResult, contender: ContenderResult) -> None:
    """Figures of one run belong to its rounds, whatever part of them a hand has changed."""
    if contender.imported_from is not None:
        return
    if result.settings is None or result.machine is None:
        what = f"damaged: nothing says how {shown(contender.name)} was measured"
        raise BenchmarkError(what, where=path, hint=_AGAIN)
    expected = result.settings.trials
    lengths = {len(values) for values in contender.samples.values()} | {len(result.settings.calibration_ms)}
    if lengths != {expected}:
        found = ", ".join(map(str, sorted(lengths)))
        what = (
            f"damaged: {found} samples of {shown(contender.name)}, expected one for each of {expected} rounds"
        )
        raise BenchmarkError(what, where=path, hint=_AGAIN)


def _follows(contender: ContenderResult) -> bool:
    """Whether the distributions are those of the samples: comparisons look at the samples alone."""
    expected = spreads_of(contender.samples)
    if expected.keys() != contender.metrics.keys():
        return False
    for metric, spread in expected.items():
        pairs = zip(astuple(spread), astuple(contender.metrics[metric]), strict=True)
        if not all(a == b or (a and b and math.isclose(a, b, rel_tol=1e-6)) for a, b in pairs):
            return False
    return True
