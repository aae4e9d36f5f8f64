"""See that a bundle is what its manifest says, to the last byte, and that nothing else is in it."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.bundle.contents import unlisted
from fastvlm_convert.bundle.license import NO_LICENSE, NOTICE
from fastvlm_convert.checkpoint.quantized_checkpoint import is_quantized
from fastvlm_convert.delivery.names import clashes, name_problem, quoted
from fastvlm_convert.delivery.signature import signature_problem
from fastvlm_convert.errors import BundleError, MalformedManifestError
from fastvlm_convert.manifest import (
    BESIDE,
    FILE_NAME,
    SIGNATURE_FILE,
    VERIFICATION_FILE,
    FileEntry,
    Manifest,
    Status,
    contradictions,
    file_entry,
    read_manifest,
)
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.verification.check import Check, equal, not_run, status_of
from fastvlm_convert.verification.record import read_record

_TARGET: Final = "bundle"
_FEW: Final = 3  # problems that a reason names
_KINDS: Final = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class CheckResult:
    """What was found about a bundle.

    Attributes:
        checks: One for each question.
        problems: Everything that is wrong, in full; checks name the first few.
        warnings: What the user should know.
        num_files: Files that the manifest lists.
        total_bytes: Their size.
    """

    checks: tuple[Check, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    num_files: int
    total_bytes: int

    @property
    def status(self) -> Status:
        """`failed` if any check failed, `not_run` if any was not run, else `passed`."""
        return status_of(self.checks)


class _Findings:
    """Checks as they are made."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.problems: list[str] = []

    def add(self, stage: str, metric: str, problems: list[str], unread: list[str] | None = None) -> None:
        """A check that there are no problems.

        Args:
            stage: What was checked.
            metric: What it was checked for.
            problems: What is wrong.
            unread: What could not be looked at.
        """
        self.problems += problems
        if not problems and unread:
            self.checks.append(not_run(_TARGET, stage, metric, _few(unread)))
        else:
            self.checks.append(equal(_TARGET, stage, metric, len(problems), _few(problems), None))


def _few(problems: list[str]) -> str:
    more = f"; and {len(problems) - _FEW} more" if len(problems) > _FEW else ""
    return "; ".join(problems[:_FEW]) + more


def check_bundle(
    bundle: Path, public_key: Path | None = None, on_progress: OnStage = ignore_stage
) -> CheckResult:
    """Check a bundle: manifest, files, contents, license, record of verification and signature.

    Nothing in it is executed, no link is followed, and pipes and devices are not opened.

    Args:
        bundle: Its folder.
        public_key: With which the signature is checked; None leaves it alone.
        on_progress: Called with what is being done and the share of it that is done, 0..1.

    Raises:
        BundleError: It is no bundle, or of another version.
        SignatureError: The key cannot be used.
        MissingDependencyError: The signature is to be checked, and the extra `sign` is not installed.
    """
    found = _Findings()
    try:
        manifest = _manifest(bundle)
    except MalformedManifestError as error:
        found.add("manifest", "schema", [error.args[0]])
        why = "the manifest is damaged"
        asked = [("files", "sha256"), ("contents", "extra"), ("license", "present")]
        asked += [("signature", "valid")] if public_key is not None else []
        found.checks += [not_run(_TARGET, stage, metric, why) for stage, metric in asked]
        return CheckResult(tuple(found.checks), tuple(found.problems), (), 0, 0)
    names = manifest.files
    odd = [problem for name in names if (problem := name_problem(name)) is not None]
    listed = [
        quoted(name) + " cannot be among its own files" for name in (FILE_NAME, *BESIDE) if name in names
    ]
    found.add("manifest", "schema", [*contradictions(manifest), *odd, *clashes(names), *listed])
    wrong, unread = _file_problems(bundle, manifest, on_progress)
    found.add("files", "sha256", wrong, unread)
    try:
        strays = [f"{quoted(name)} is not the bundle's" for name in _strays(bundle, manifest)]
        found.add("contents", "extra", strays)
    except OSError as error:
        found.add("contents", "extra", [], [f"{error.filename}: {error.strerror}"])
    if manifest.source.license != NO_LICENSE:
        found.add("license", "present", list(_license_problems(bundle, manifest)))
    if _is_there(bundle / VERIFICATION_FILE):
        found.add("verification", "manifest_sha256", list(_record_problems(bundle)))
    if public_key is not None:
        is_sound = all(check.status == "passed" for check in found.checks)
        _check_signature(found, bundle, public_key, is_sound)
    total = sum(entry.size for entry in names.values())
    warnings = tuple(_warnings(bundle, manifest, public_key))
    return CheckResult(tuple(found.checks), tuple(found.problems), warnings, len(names), total)


def require_sound(bundle: Path, on_progress: OnStage = ignore_stage) -> None:
    """See that nothing is wrong with a bundle that is to be passed on.

    Raises:
        BundleError: It is no bundle, or a check failed or could not be run.
    """
    result = check_bundle(bundle, on_progress=on_progress)
    reasons = [check.reason for check in result.checks if check.reason is not None]
    if reasons:
        hint = f"`fastvlm-convert bundle check {bundle}` lists everything"
        raise BundleError(f"the bundle is not sound: {'; '.join(reasons)}", where=bundle, hint=hint)


def _manifest(bundle: Path) -> Manifest:
    if is_quantized(bundle):
        raise BundleError(
            "this is a quantized checkpoint, which records no hashes to check",
            where=bundle,
            hint=f"`fastvlm-convert inspect {bundle}` reads its record and every header",
        )
    path = bundle / FILE_NAME
    if path.is_symlink():
        raise MalformedManifestError(f"{FILE_NAME} is a link", where=path)
    return read_manifest(bundle)


def _file_problems(bundle: Path, manifest: Manifest, on_progress: OnStage) -> tuple[list[str], list[str]]:
    """What is wrong with the files that the manifest lists, and which could not be read."""
    wrong: list[str] = []
    unread: list[str] = []
    total = sum(entry.size for entry in manifest.files.values()) or 1
    done = 0
    on_progress("files", 0.0)
    for name, entry in manifest.files.items():
        if name_problem(name) is None:
            try:
                problem = _file_problem(bundle, name, entry)
            except OSError as error:
                unread.append(f"{quoted(name)} cannot be read: {error.strerror}")
            else:
                wrong += [] if problem is None else [f"{quoted(name)} {problem}"]
        done += entry.size
        on_progress("files", min(1.0, done / total))
    on_progress("files", 1.0)
    return wrong, unread


def _file_problem(bundle: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with one file.

    Raises:
        OSError: It cannot be read.
    """
    path = bundle
    *folders, _ = name.split("/")
    for folder in folders:
        path = path / folder
        if path.is_symlink():
            return "lies behind a link"
    path = bundle / name
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    for is_kind, kind in _KINDS:
        if is_kind(status.st_mode):
            return f"is {kind}"
    if status.st_size != entry.size:
        return f"has {status.st_size} bytes, the manifest says {entry.size}"
    if file_entry(path).sha256 != entry.sha256:
        return "has other content than the manifest says"
    return None


def _strays(bundle: Path, manifest: Manifest) -> list[str]:
    return unlisted(bundle, {FILE_NAME, *BESIDE, *manifest.files})


def _license_problems(bundle: Path, manifest: Manifest) -> Iterator[str]:
    license = manifest.source.license
    for name in (license, NOTICE):
        if name not in manifest.files:
            yield f"{quoted(name)} is not among the bundle's files"
        elif manifest.files[name].size == 0:
            yield f"{quoted(name)} is empty"


def _record_problems(bundle: Path) -> Iterator[str]:
    if (bundle / VERIFICATION_FILE).is_symlink():
        yield f"{VERIFICATION_FILE} is a link"
        return
    try:
        read_record(bundle)
    except BundleError as error:
        yield f"{VERIFICATION_FILE}: {error.args[0]}"


def _check_signature(found: _Findings, bundle: Path, public_key: Path, is_sound: bool) -> None:
    if not is_sound:
        why = "what is signed is the bundle as its manifest says, which this one is not"
        found.checks.append(not_run(_TARGET, "signature", "valid", why))
        return
    problem = signature_problem(bundle, public_key)
    found.add("signature", "valid", [] if problem is None else [problem])


def _warnings(bundle: Path, manifest: Manifest, public_key: Path | None) -> Iterator[str]:
    if manifest.source.license == NO_LICENSE:
        yield "the bundle brings no license; see that you may pass it on"
    if public_key is None and _is_there(bundle / SIGNATURE_FILE):
        yield "the bundle is signed; --signature --public-key FILE checks that, too"


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()
