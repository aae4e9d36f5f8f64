"""verification.json: what `verify` found out about a bundle, bound to the very manifest that it verified.

It lies beside the files that the manifest hashes: a bundle does not change when somebody verifies it.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert import __version__
from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.errors import BundleError, OutputError, RecipeError, shown
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.manifest import FILE_NAME, VERIFICATION_FILE, Status
from fastvlm_convert.regular_file import open_file
from fastvlm_convert.verification.answers import Answer, AnswerFigures
from fastvlm_convert.verification.bundle import VerifyResult
from fastvlm_convert.verification.check import Check, Measurement, status_of
from fastvlm_convert.verification.diagnosis import Diagnosis
from fastvlm_convert.verification.layers import Divergence, LayerFigure

SCHEMA: Final = "fastvlm-convert/verification"
SCHEMA_VERSION: Final = 2
_WRITABLE: Final = "see that you may write into the bundle"
_AGAIN: Final = "verify the bundle again with --record"


@dataclass(frozen=True)
class VerificationRecord:
    """What verification.json says.

    Attributes:
        tool: Version of fastvlm-convert that verified.
        manifest_sha256: Hash of the fastvlm_manifest.json that was verified.
        reference_sha256: Hash of the checkpoint that the bundle was compared with.
        num_questions: Questions about pictures that were asked.
        status: What came of it.
        checks: Figures against their thresholds.
        measurements: Figures that gate nothing.
        warnings: What was odd.
        answers: Every answer of every execution, beside the reference's.
        answer_figures: The same in figures, one an execution.
        layers: Every operation of every execution, on one picture.
        first_divergence: By target, the first operation below its gate, where a gate broke.
        diagnoses: Of each target that fails, the first stage that breaks its gate, and the likely cause.
    """

    tool: str
    manifest_sha256: str
    reference_sha256: str
    num_questions: int
    status: Status
    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]
    answers: tuple[Answer, ...]
    answer_figures: tuple[AnswerFigures, ...]
    layers: tuple[LayerFigure, ...]
    first_divergence: dict[str, Divergence | None]
    diagnoses: tuple[Diagnosis, ...]

    def __post_init__(self) -> None:
        if self.status != status_of(self.checks):
            raise BundleError(f"status is {self.status}, its checks say {status_of(self.checks)}")


def manifest_hash(bundle: Path) -> str:
    """SHA-256 of a bundle's manifest, to which everything said about the bundle is bound.

    Raises:
        OSError: It cannot be read.
    """
    with open_file(bundle / FILE_NAME) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_recordable(bundle: Path) -> None:
    """See that a record can be written into a bundle, before the minutes that verifying takes.

    Raises:
        OutputError: It cannot.
    """
    path = bundle / VERIFICATION_FILE
    is_bundle = (bundle / FILE_NAME).exists()  # else the error is another
    if is_bundle and (path.is_dir() or not os.access(bundle, os.W_OK)):
        raise OutputError("cannot record here", where=path, hint=_WRITABLE)


def write_record(bundle: Path, result: VerifyResult) -> Path:
    """Record in a bundle what `verify` found; an earlier record is replaced.

    Raises:
        OutputError: It cannot be written there.
    """
    path = bundle / VERIFICATION_FILE
    try:
        record = VerificationRecord(
            tool=__version__,
            manifest_sha256=manifest_hash(bundle),
            reference_sha256=result.reference_sha256,
            num_questions=result.num_questions,
            status=result.status,
            checks=result.checks,
            measurements=result.measurements,
            warnings=result.warnings,
            answers=result.answers,
            answer_figures=result.figures,
            layers=result.layers,
            first_divergence=dict(result.first_divergence),
            diagnoses=result.diagnoses,
        )
        value = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(record)}
        with whole_file(path) as partial:
            partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot record: {error.strerror}", where=path, hint=_WRITABLE) from error
    return path


def read_record(bundle: Path) -> VerificationRecord | None:
    """What was recorded about a bundle, or None where nothing was.

    Raises:
        BundleError: The record cannot be read, is malformed, or is about another manifest.
    """
    path = bundle / VERIFICATION_FILE
    try:
        value = read_json_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"cannot read: {error.strerror}", where=path, hint=_AGAIN) from error
    except ValueError as error:
        raise BundleError(f"not valid JSON: {error}", where=path, hint=_AGAIN) from error
    if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:
        raise BundleError("not a record of fastvlm-convert", where=path, hint=_AGAIN)
    version = value.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        what = f"record version {shown(version)}; this tool reads {SCHEMA_VERSION}"
        raise BundleError(what, where=path, hint=_AGAIN)
    try:
        record = from_plain(VerificationRecord, value)
    except (BundleError, RecipeError) as error:
        raise BundleError(f"malformed: {error.args[0]}", where=path, hint=_AGAIN) from error
    if record.manifest_sha256 != manifest_hash(bundle):
        raise BundleError("it is about another manifest than the bundle's", where=path, hint=_AGAIN)
    return record
