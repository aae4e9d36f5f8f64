"""An asset pack of Apple's Background Assets: the manifest and the files that `ba-package` reads.

The format is that of `xcrun ba-package template`, which
https://developer.apple.com/documentation/backgroundassets/creating-managed-asset-packs describes.
"""

import json
from typing import Final

from fastvlm_convert.delivery.stores import StoreFit

MANIFEST: Final = "Manifest.json"
_PLATFORMS: Final = ("iOS", "macOS")


def background_assets_files(name: str, fit: StoreFit) -> tuple[dict[str, bytes], dict[str, str]]:
    """What `ba-package` is started beside.

    Args:
        name: The asset pack's id, and the folder in which its files lie.
        fit: The packs: one, since no limit is published for one.

    Returns:
        Content of files to make, and files of the bundle to copy: both by path, relative to the output.
    """
    manifest = {
        "assetPackID": name,
        "downloadPolicy": {"onDemand": {}},
        "fileSelectors": [{"directory": name}],
        "platforms": list(_PLATFORMS),
    }
    made = {MANIFEST: (json.dumps(manifest, indent=2) + "\n").encode()}
    return made, {f"{name}/{file}": file for pack in fit.packs for file in pack.files}
