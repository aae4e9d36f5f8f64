"""Which format a file of figures has."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.bench.baseline import SCHEMA as RESULT_SCHEMA
from fastvlm_convert.bench.baseline import parse_result
from fastvlm_convert.bench.imported.figures import STAGES, Source, merged
from fastvlm_convert.bench.imported.latency import is_latency, read_latency
from fastvlm_convert.bench.imported.perf_test import is_perf_test, read_perf_test
from fastvlm_convert.bench.imported.xcode import FILE_NAME, MAX_BYTES, is_xcode_report, read_xcode_report
from fastvlm_convert.bench.result import BenchResult, ContenderResult
from fastvlm_convert.errors import BenchmarkError, shown
from fastvlm_convert.json_file import parse_json
from fastvlm_convert.regular_file import read_text

_KNOWN: Final = (
    "a result of bench, fastvlm-convert/latency, Xcode's NAME.mlperf, or a file of onnxruntime_perf_test"
)


def parse_source(text: str, device: str | None) -> Source:
    """`decode=FILE` or `FILE`, as users give it.

    Args:
        text: What was given.
        device: What was measured, where the file does not say.

    Raises:
        BenchmarkError: It names a stage and no file.
    """
    stage, equals, path = text.partition("=")
    if equals and stage in STAGES:
        if not path:
            raise BenchmarkError(f"--import {text} names no file", hint=f"give --import {stage}=FILE")
        return Source(Path(path), stage, device)
    return Source(Path(text), None, device)


def read_figures(sources: Sequence[Source]) -> tuple[ContenderResult, ...]:
    """The contenders in some files, in order; parts of one answer come together.

    Raises:
        BenchmarkError: A file cannot be read or has no known format, or two hold the same figures.
    """
    found: dict[str, ContenderResult] = {}
    for source in sources:
        for contender in _contenders(source):
            before = found.get(contender.name)
            if before is None:
                found[contender.name] = contender
            elif source.stage is None or before.samples.keys() & contender.samples.keys():
                raise BenchmarkError(
                    f"another file has the same figures of '{contender.name}'",
                    where=source.path,
                    hint="for parts of one model name them: --import vision=FILE --import decode=FILE",
                )
            else:
                found[contender.name] = merged(before, contender)
    return tuple(found.values())


def read_whole_result(sources: Sequence[Source]) -> BenchResult | None:
    """The one file that is imported as the run that it is, where it is a result of bench; else None.

    Raises:
        BenchmarkError: It cannot be read, or is damaged.
    """
    if len(sources) != 1:
        return None
    (source,) = sources
    value = _read(source)
    if not _is_result(value):
        return None
    return replace(
        parse_result(source.path, value), against=None, max_regression_percent=None, comparisons=()
    )


def _contenders(source: Source) -> tuple[ContenderResult, ...]:
    value = _read(source)
    if isinstance(value, str):
        return (read_perf_test(source, value),)
    if _is_result(value):
        return tuple(_of_elsewhere(c) for c in parse_result(source.path, value).contenders)
    if isinstance(value, dict) and is_latency(value):
        return (read_latency(source, value),)
    if isinstance(value, dict) and is_xcode_report(value):
        return (read_xcode_report(source, value),)
    raise BenchmarkError(f"not a known format: {shown(value)}", where=source.path, hint=f"give {_KNOWN}")


def _read(source: Source) -> Any:  # noqa: ANN401
    """The text of a file of onnxruntime_perf_test, the value in any other, which is JSON."""
    path = source.path / FILE_NAME if source.path.is_dir() else source.path
    try:
        text = read_text(path, MAX_BYTES)
    except FileNotFoundError as error:
        what = "there is no such file" if path == source.path else f"the folder has no {FILE_NAME}"
        raise BenchmarkError(what, where=source.path, hint=f"give {_KNOWN}") from error
    except OSError as error:
        raise BenchmarkError(f"cannot read: {error.strerror}", where=source.path) from error
    except ValueError as error:
        raise BenchmarkError(f"no text: {error}", where=source.path, hint=f"give {_KNOWN}") from error
    if is_perf_test(text):
        return text
    try:
        value = parse_json(text)
    except ValueError as error:
        what = f"neither JSON ({error}) nor a file of onnxruntime_perf_test"
        raise BenchmarkError(what, where=source.path, hint=f"give {_KNOWN}") from error
    if isinstance(value, str):
        raise BenchmarkError(f"not a known format: {shown(value)}", where=source.path, hint=f"give {_KNOWN}")
    return value


def _is_result(value: object) -> bool:
    return isinstance(value, dict) and value.get("schema") == RESULT_SCHEMA


def _of_elsewhere(contender: ContenderResult) -> ContenderResult:
    """What another machine has measured with this tool, under a name that no contender of this one has."""
    if contender.imported_from is not None:
        return contender
    name = f"{contender.name} on {contender.measured_on}"
    return replace(contender, name=name, imported_from=RESULT_SCHEMA)
