"""What describes a bundle to people and auditors: made last, of everything else that is in it."""

import hashlib
from dataclasses import replace

from fastvlm_convert.bundle.mlbom import MLBOM_FILE, mlbom
from fastvlm_convert.bundle.model_card import CARD_FILE, base_model, model_card
from fastvlm_convert.manifest import FileEntry, Manifest
from fastvlm_convert.weights.model_config import ModelConfig


def describing_files(manifest: Manifest, config: ModelConfig, license_text: str | None) -> dict[str, bytes]:
    """The model card, and the bill of materials, which lists the card.

    Args:
        manifest: The bundle's, but for these two files.
        config: Dimensions.
        license_text: The model's license, or None where there is none.
    """
    base = base_model(config)
    card = model_card(manifest, base, license_text)
    entry = FileEntry(len(card), hashlib.sha256(card).hexdigest())
    files = dict(sorted({**manifest.files, CARD_FILE: entry}.items()))
    return {CARD_FILE: card, MLBOM_FILE: mlbom(replace(manifest, files=files), base)}
