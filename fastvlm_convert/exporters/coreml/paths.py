"""Where the packages and their files lie, and the manifest of a package."""

import hashlib
import json
import uuid
from typing import Final

from fastvlm_convert.io_names import APPLE_FOLDER, numbered

FOLDER: Final = "coreml"
VISION_PACKAGE: Final = f"{FOLDER}/vision.mlpackage"
APPLE_PACKAGE: Final = f"{APPLE_FOLDER}/fastvithd.mlpackage"

AUTHOR: Final = "com.apple.CoreML"
SPEC: Final = "model.mlmodel"
# Of every package, relative to it.
FILES: Final = ("Manifest.json", f"Data/{AUTHOR}/{SPEC}", f"Data/{AUTHOR}/weights/weight.bin")


def decoder_package(number: int | None) -> str:
    """Where a package of the decoder lies; None is the last, or the only one."""
    return f"{FOLDER}/{numbered('decoder', number)}.mlpackage"


def package_manifest(content: bytes) -> str:
    """Manifest.json as coremltools writes it, but with ids that come from the content."""
    model_id, weights_id = (
        str(uuid.uuid5(uuid.NAMESPACE_URL, text))
        for text in (f"model:{hashlib.sha256(content).hexdigest()}", "weights")
    )

    def entry(description: str, name: str) -> dict[str, str]:
        return {"author": AUTHOR, "description": description, "name": name, "path": f"{AUTHOR}/{name}"}

    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            model_id: entry("CoreML Model Specification", SPEC),
            weights_id: entry("CoreML Model Weights", "weights"),
        },
        "rootModelIdentifier": model_id,
    }
    return json.dumps(manifest, indent=4, sort_keys=True, allow_nan=False) + "\n"
