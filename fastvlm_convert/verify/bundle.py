"""Verify a whole bundle: its files first, then every target in it."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, content_hash
from fastvlm_convert.contract import STAGES
from fastvlm_convert.demo.samples import check_samples
from fastvlm_convert.errors import BundleError, ImageError, MissingDependencyError, TokenizerError
from fastvlm_convert.manifest import Manifest, changed_files
from fastvlm_convert.preprocess import load_image
from fastvlm_convert.runtime.loaded import load_bundle, load_reference
from fastvlm_convert.verify.check import Check, Measurement, equal, not_run
from fastvlm_convert.verify.compare import Question, compare

OnProgress = Callable[[str, float], None]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DEFAULT_QUESTION = "Describe the image."


@dataclass(frozen=True)
class VerifyResult:
    """What was checked and measured, and what the user should know."""

    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]

    @property
    def status(self) -> str:
        """`failed` if any check failed, `not_run` if any was not run, else `passed`."""
        found = {check.status for check in self.checks}
        return next((s for s in ("failed", "not_run") if s in found), "passed")


def standard_questions() -> list[Question]:
    """The standard check pictures of the demo generator, one question each."""
    return [Question(image, question.question) for image, question in check_samples()]


def folder_questions(folder: Path) -> list[Question]:
    """The pictures of a folder, with the questions of its `questions.json` or one default question each.

    Raises:
        ImageError: There is no such folder, it has no pictures, or one cannot be read.
    """
    if not folder.is_dir():
        raise ImageError("there is no such folder of images", where=folder)
    listing = folder / "questions.json"
    if listing.is_file():
        try:
            entries = [(str(e["image"]), str(e["question"])) for e in json.loads(listing.read_text("utf-8"))]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ImageError(
                "expected a list of objects with 'image' and 'question'", where=listing
            ) from error
    else:
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        entries = [(name, DEFAULT_QUESTION) for name in names]
    if not entries:
        raise ImageError(f"no images here ({', '.join(IMAGE_SUFFIXES)})", where=folder)
    return [Question(load_image(folder / name), text) for name, text in entries]


def verify(
    bundle: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    questions: Sequence[Question],
    on_progress: OnProgress = lambda stage, share: None,
) -> VerifyResult:
    """Check a bundle against the checkpoint it was made from.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        checkpoint: The reference.
        questions: Pictures and questions.
        on_progress: Called with what is being done and the share of it that is done, 0..1.
    """
    contract = manifest.contract
    on_progress("files", 0.0)
    changed = changed_files(bundle, manifest)
    on_progress("files", 1.0)
    checks = [equal("bundle", "files", "sha256", len(changed), f"changed: {', '.join(changed)}", None)]
    measurements: list[Measurement] = []
    reference = load_reference(
        checkpoint,
        contract.image_size,
        contract.image_mode,
        contract.context_length,
        lambda share: on_progress("reference", share),
    )
    for target in manifest.targets:
        try:
            found = compare(
                target,
                load_bundle(bundle, manifest, target),
                reference,
                questions,
                manifest.recipe.gates,
                lambda share, target=target: on_progress(target, share),  # type: ignore[misc]
            )
        except (BundleError, TokenizerError, MissingDependencyError) as error:
            checks += [not_run(target, s, _metric(s), str(error)) for s in STAGES]
            continue
        checks += found.checks
        measurements += found.measurements
    warnings = []
    on_progress("checkpoint", 0.0)
    if content_hash(checkpoint.files) != manifest.source.sha256:
        warnings.append("the bundle was made from other files than this reference (their hashes differ)")
    on_progress("checkpoint", 1.0)
    return VerifyResult(tuple(checks), tuple(measurements), tuple(warnings))


def _metric(stage: str) -> str:
    return "token_ids" if stage == "greedy_text" else "sqnr_db"


def to_dict(result: Check | Measurement) -> dict[str, object]:
    """A check or measurement as plain data."""
    return dataclasses.asdict(result)
