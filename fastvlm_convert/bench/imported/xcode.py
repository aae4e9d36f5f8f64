"""Xcode's performance report of a Core ML model: a folder `NAME.mlperf` with `report.json`, or that file.

Apple does not document it. The fields read here are those on which published readers of the reports of Xcode
15 and 16 agree: `deviceResults.predict.samples` and `.load.samples` in seconds, `deviceInfo.modelName` and
`.osNameAndVersionWithoutBuildNumber`, `computeUnit` as the number of Core ML's `MLComputeUnits`. What else
stands in `deviceInfo` names the device's owner (serial number, id, given name) and is not read.
"""

from typing import Any, Final

import numpy as np

from fastvlm_convert.bench.imported.figures import Source, imported
from fastvlm_convert.bench.result import ContenderResult
from fastvlm_convert.errors import BenchmarkError, shown

FORMAT: Final = "Xcode performance report"
FOLDER_SUFFIX: Final = ".mlperf"
FILE_NAME: Final = "report.json"
MAX_BYTES: Final = 64 << 20  # it holds the model's structure, every operation of it
# By the number of MLComputeUnits: in full, and as a part of a name.
_COMPUTE_UNITS: Final = {
    "0": ("CPU", "CPU"),
    "1": ("CPU and GPU", "CPU+GPU"),
    "2": ("all units", "all units"),
    "3": ("CPU and Neural Engine", "CPU+ANE"),
}


def is_xcode_report(value: dict[str, Any]) -> bool:
    """Whether the JSON of a file is such a report."""
    return "deviceResults" in value


def read_xcode_report(source: Source, value: dict[str, Any]) -> ContenderResult:
    """The figures in a report.

    Args:
        source: The file or folder.
        value: Content of its JSON.

    Raises:
        BenchmarkError: It has no times of predictions, or they are no numbers.
    """
    results = _object(source, value, "deviceResults")
    predict = _seconds(source, results, "predict")
    if predict is None:
        raise BenchmarkError(
            "the report has no deviceResults.predict.samples",
            where=source.path,
            hint="run the report again in Xcode with prediction included",
        )
    load = _seconds(source, results, "load")
    device, system = _device(source, value)
    units, short = _COMPUTE_UNITS.get(str(value.get("computeUnit")), ("unknown units", "coreml"))
    return imported(
        source,
        name=source.name_of(_model_name(source, value), f"{device} {short}"),
        executed_by=f"Core ML ({units})",
        measured_on=f"{device}, {system}" if system else device,
        imported_from=FORMAT,
        samples={source.metric: tuple(1e3 * seconds for seconds in predict)},
        load_ms=None if load is None else 1e3 * float(np.median(load)),
    )


def _device(source: Source, value: dict[str, Any]) -> tuple[str, str]:
    """The device's model and its system, which may be empty."""
    info = _object(source, value, "deviceInfo")
    model, system = info.get("modelName"), info.get("osNameAndVersionWithoutBuildNumber")
    if isinstance(model, str) and model:
        return model, system if isinstance(system, str) else ""
    if source.device is None:
        raise BenchmarkError(
            "the report does not say which device it was measured on",
            where=source.path,
            hint="give --measured-on, for example --measured-on 'iPhone 16, iOS 26.1'",
        )
    return source.device, ""


def _model_name(source: Source, value: dict[str, Any]) -> str:
    name = _object(source, value, "modelMetadata").get("fileName")
    return name if isinstance(name, str) and name else source.path.stem


def _object(source: Source, value: dict[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key, {})
    if not isinstance(found, dict):
        raise BenchmarkError(f"{key} is {shown(found)}, expected an object", where=source.path)
    return found


def _seconds(source: Source, results: dict[str, Any], key: str) -> list[float] | None:
    """The times of a part of the report, or None where it has none."""
    samples = _object(source, results, key).get("samples")
    if samples is None or samples == []:
        return None
    if not isinstance(samples, list) or any(type(s) not in (int, float) for s in samples):
        what = f"deviceResults.{key}.samples is {shown(samples)}, expected numbers of seconds"
        raise BenchmarkError(what, where=source.path)
    return [float(s) for s in samples]
