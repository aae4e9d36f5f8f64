"""A bundle as the server knows it without loading weights: what turns requests into prompts, and its name."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fastvlm_convert.checkpoint.tokenizer import TextTokenizer, read_tokenizer
from fastvlm_convert.delivery.check import check_bundle
from fastvlm_convert.errors import BundleError
from fastvlm_convert.manifest import FILE_NAME, Manifest, chosen_target, load_manifest, takes_pictures
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.prompt import Message, Prompt, build_prompt
from fastvlm_convert.targets import Target

_CHECKED: Final = ("manifest", "files")  # whoever runs a bundle may put files of their own beside


@dataclass(frozen=True)
class ServedBundle:
    """A bundle that is served.

    Attributes:
        name: What requests call it (`model`).
        path: Its folder.
        target: Which of its formats is run.
        manifest: Its manifest.
        sha256: Of its manifest, which has the hashes of all its files.
        tokenizer: Text to ids and back.
        images: How pictures are prepared.
    """

    name: str
    path: Path
    target: Target
    manifest: Manifest
    sha256: str
    tokenizer: TextTokenizer
    images: ImageSettings

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The prompt of a conversation; prepares its pictures, which takes time.

        Raises:
            PromptError: Roles are out of order.
        """
        form = self.manifest.contract.conversation
        return build_prompt(messages, form, self.tokenizer, self.images)


def check_files(bundle: Path) -> None:
    """See that a bundle's files are those that its manifest lists, by their hashes.

    Raises:
        BundleError: One is not, or cannot be read.
    """
    found = check_bundle(bundle)
    wrong = [c.reason for c in found.checks if c.stage in _CHECKED and c.status != "passed" and c.reason]
    if wrong:
        hint = f"`fastvlm-convert bundle check {bundle}` lists everything; copy it again, or export it again"
        raise BundleError(
            f"the bundle is not what its manifest says: {'; '.join(wrong)}", where=bundle, hint=hint
        )


def check_unchanged(bundle: ServedBundle) -> None:
    """See that a bundle's folder still has what the server was started with, before it is loaded once more.

    Prompts, cached answers and `/health` are of that bundle, so another one's answers would be wrong.

    Raises:
        BundleError: It has something else, or is damaged or gone.
    """
    check_files(bundle.path)
    if _sha256(bundle.path) != bundle.sha256:
        raise BundleError(
            "the folder has another bundle than when the server was started",
            where=bundle.path,
            hint="start the server again to serve it",
        )


def open_served_bundle(path: Path, name: str | None = None, target: Target | None = None) -> ServedBundle:
    """Read a bundle's manifest and tokenizer.

    Args:
        path: Its folder.
        name: What requests call it; the folder's name if None.
        target: Which of its formats to run; None takes the first.

    Raises:
        BundleError: It is no bundle, or the target is not in it.
        TokenizerError: Its tokenizer is damaged.
    """
    manifest = load_manifest(path)
    chosen = chosen_target(manifest, target, path)
    in_graph = any(takes_pictures(a) for a in manifest.artifacts if a.target == chosen)
    return ServedBundle(
        name=name or path.resolve().name,
        path=path,
        target=chosen,
        manifest=manifest,
        sha256=_sha256(path),
        tokenizer=read_tokenizer(path),
        images=replace(manifest.contract.images, in_graph=in_graph),
    )


def _sha256(bundle: Path) -> str:
    return hashlib.sha256((bundle / FILE_NAME).read_bytes()).hexdigest()
