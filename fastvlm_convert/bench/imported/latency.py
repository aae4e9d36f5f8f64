"""Our own format of figures from a device: what an app writes that times its answers. See docs/bench.md."""

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from fastvlm_convert.bench.imported.figures import Source, imported
from fastvlm_convert.bench.result import ContenderResult
from fastvlm_convert.dataclass_io import about, from_plain, schema_of
from fastvlm_convert.errors import BenchmarkError, RecipeError, shown

SCHEMA: Final = "fastvlm-convert/latency"
SCHEMA_VERSION: Final = 1


@dataclass(frozen=True)
class Samples:
    """Times of answers, each above 0; at least one list must be given. Lists may differ in length."""

    prepare_ms: tuple[float, ...] = field(
        default=(), metadata=about("Picture and question to the inputs of the model.")
    )
    vision_ms: tuple[float, ...] = field(
        default=(), metadata=about("The image encoder, all images of an answer.")
    )
    prefill_ms: tuple[float, ...] = field(
        default=(),
        metadata=about("Embedding and prefill of the prompt, to the first token."),
    )
    ttft_ms: tuple[float, ...] = field(
        default=(),
        metadata=about("Time to the first token: image encoder and prefill."),
    )
    decode_ms: tuple[float, ...] = field(
        default=(),
        metadata=about("Each token after the first: the answer's mean."),
    )
    end_to_end_ms: tuple[float, ...] = field(
        default=(),
        metadata=about("Picture and question to the text of the whole answer."),
    )
    energy_j: tuple[float, ...] = field(default=(), metadata=about("Energy of an answer, in joules."))


@dataclass(frozen=True)
class Warmup:
    """One answer; names as those of `Samples`."""

    prepare_ms: float | None = None
    vision_ms: float | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    decode_ms: float | None = None
    end_to_end_ms: float | None = None
    energy_j: float | None = None


@dataclass(frozen=True)
class Latency:
    """The file."""

    schema: Literal["fastvlm-convert/latency"] = field(metadata=about("What this file is."))
    schema_version: Literal[1] = field(metadata=about("Version of its layout."))
    name: str = field(metadata=about("What was measured, as a report shall call it."))
    measured_on: str = field(metadata=about("Device and system: `Pixel 9, Android 15`."))
    executed_by: str = field(metadata=about("Runtime, provider and threads: `onnxruntime 1.22, 4 threads`."))
    samples: Samples = field(
        metadata=about("Answers that count, without the first after loading; each figure is above 0.")
    )
    load_ms: float | None = field(
        default=None, metadata=about("Time to load the model, in milliseconds.", exclusive_minimum=0)
    )
    peak_memory_bytes: int | None = field(
        default=None, metadata=about("Most memory that the app had resident.", minimum=1)
    )
    warmup: Warmup | None = field(
        default=None, metadata=about("The first answer after loading, which counts nowhere else.")
    )


def is_latency(value: dict[str, Any]) -> bool:
    """Whether the JSON of a file says that it is such a file."""
    return value.get("schema") == SCHEMA


def read_latency(source: Source, value: dict[str, Any]) -> ContenderResult:
    """The figures in such a file.

    Args:
        source: The file.
        value: Content of its JSON.

    Raises:
        BenchmarkError: It is damaged, of another version, or has no figures.
    """
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        what = f"version {shown(version)} of this format; this tool reads {SCHEMA_VERSION}"
        raise BenchmarkError(what, where=source.path)
    if source.stage is not None:
        raise BenchmarkError(
            f"the file says itself which parts of an answer it measures, so '{source.stage}=' has no meaning",
            where=source.path,
            hint="leave it out",
        )
    try:
        latency = from_plain(Latency, value)
    except RecipeError as error:
        raise BenchmarkError(f"damaged: {error.args[0]}", where=source.path, hint=error.given_hint) from error
    for name in ("load_ms", "peak_memory_bytes"):
        figure = getattr(latency, name)
        if figure is not None and not (math.isfinite(figure) and figure > 0):
            raise BenchmarkError(f"{name} is {figure}, expected a number above 0", where=source.path)
    samples = {name: values for name, values in vars(latency.samples).items() if values}
    if not samples:
        raise BenchmarkError(
            "the file has no samples", where=source.path, hint="docs/bench.md has an example"
        )
    return imported(
        source,
        name=latency.name,
        executed_by=latency.executed_by,
        measured_on=latency.measured_on,
        imported_from=SCHEMA,
        samples=samples,
        load_ms=latency.load_ms,
        peak_memory_bytes=latency.peak_memory_bytes,
        warmup={name: value for name, value in vars(latency.warmup or Warmup()).items() if value is not None},
    )


def latency_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Latency of FastVLM on a device, for fastvlm-convert bench --import",
        **schema_of(Latency),
    }
