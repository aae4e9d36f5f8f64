"""Whether a bundle fits a store: the document and the line that several commands end with."""

from typing import Any

from rich.markup import escape

from fastvlm_convert.cli.console import size_text
from fastvlm_convert.delivery.stores import StoreFit

_VERDICTS = {True: "fits", False: "does not fit", None: "may not fit"}


def fit_document(fit: StoreFit) -> dict[str, Any]:
    """Everything that is known, as plain data."""
    return {
        "name": fit.store.name,
        "title": fit.store.title,
        "fits": fit.fits,
        "reason": fit.reason,
        "packs": [
            {"files": list(pack.files), "bytes": pack.num_bytes, "download_bytes": pack.download_bytes}
            for pack in fit.packs
        ],
        "download_bytes": fit.download_bytes,
        "max_pack_bytes": fit.store.max_pack_bytes,
        "max_app_bytes": fit.store.max_app_bytes,
    }


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
