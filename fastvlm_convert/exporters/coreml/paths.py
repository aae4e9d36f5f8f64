"""Where the packages and their files lie."""

from typing import Final

from fastvlm_convert.io_names import APPLE_FOLDER

FOLDER: Final = "coreml"
VISION_PACKAGE: Final = f"{FOLDER}/vision.mlpackage"
DECODER_PACKAGE: Final = f"{FOLDER}/decoder.mlpackage"
APPLE_PACKAGE: Final = f"{APPLE_FOLDER}/fastvithd.mlpackage"

AUTHOR: Final = "com.apple.CoreML"
SPEC: Final = "model.mlmodel"
# Of every package, relative to it.
FILES: Final = ("Manifest.json", f"Data/{AUTHOR}/{SPEC}", f"Data/{AUTHOR}/weights/weight.bin")
