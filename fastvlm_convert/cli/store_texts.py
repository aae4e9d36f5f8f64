"""Whether a bundle fits a store: the document and the line that several commands end with."""

from dataclasses import dataclass

from rich.markup import escape

from fastvlm_convert.amounts import size_text
from fastvlm_convert.delivery.stores import StoreFit, StoreName

_VERDICTS = {True: "fits", False: "does not fit", None: "may not fit"}


@dataclass(frozen=True)
class PackFacts:
    """Files that are downloaded together.

    Attributes:
        files: Paths relative to the bundle.
        bytes: Their size.
        download_bytes: The most that the store counts of it.
    """

    files: tuple[str, ...]
    bytes: int
    download_bytes: int


@dataclass(frozen=True)
class FitFacts:
    """Whether a bundle fits a store; see `delivery.stores`."""

    name: StoreName
    title: str
    fits: bool | None
    reason: str | None
    packs: tuple[PackFacts, ...]
    download_bytes: int
    max_pack_bytes: int | None
    max_app_bytes: int


def fit_facts(fit: StoreFit) -> FitFacts:
    """Everything that is known, for documents."""
    return FitFacts(
        name=fit.store.name,
        title=fit.store.title,
        fits=fit.fits,
        reason=fit.reason,
        packs=tuple(PackFacts(pack.files, pack.num_bytes, pack.download_bytes) for pack in fit.packs),
        download_bytes=fit.download_bytes,
        max_pack_bytes=fit.store.max_pack_bytes,
        max_app_bytes=fit.store.max_app_bytes,
    )


def fit_text(fit: StoreFit) -> str:
    """The same in a line."""
    store = fit.store
    packs = "1 pack" if len(fit.packs) == 1 else f"{len(fit.packs)} packs"
    limit = "" if store.max_pack_bytes is None else f" of at most {size_text(store.max_pack_bytes)}"
    room = (
        f"{size_text(fit.download_bytes)} of {size_text(store.max_app_bytes)} for an app, in {packs}{limit}"
    )
    reason = "" if fit.reason is None else f": {escape(fit.reason)}"
    return f"{store.title}: {_VERDICTS[fit.fits]} ({room}){reason}"
