"""What a model's license asks of those who pass a derivative on."""

from pathlib import Path
from typing import Final

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.regular_file import read_file

NO_LICENSE: Final = "not_found"
NOTICE: Final = "NOTICE"  # the file that says what was changed


def license_files(license: Path, recipe: Recipe, made: str) -> dict[str, bytes]:
    """A copy of the license, and a notice of what was changed, by name.

    Args:
        license: The checkpoint's license file.
        recipe: What the checkpoint was converted with.
        made: What people call the folder.

    Raises:
        CheckpointError: The license cannot be read.
    """
    content = _read(license)
    notice = _notice(license.name, content.decode(errors="replace"), recipe, made)
    return {license.name: content, NOTICE: notice.encode()}


def license_text(license: Path | None) -> str:
    """What a license file says, or that there is none.

    Raises:
        CheckpointError: The license cannot be read.
    """
    return (
        "No license file came with the model." if license is None else _read(license).decode(errors="replace")
    )


def _read(license: Path) -> bytes:
    try:
        return read_file(license)
    except OSError as error:
        raise CheckpointError(
            f"cannot read: {error.strerror}", where=license, hint="see that you may read it"
        ) from error


def is_apples(text: str) -> bool:
    """Whether a license is the one of Apple's research models."""
    return "Apple Machine Learning Research Model" in text


def _notice(license: str, text: str, recipe: Recipe, made: str) -> str:
    """What a license asks of those who pass a derivative on: say what it is and what was changed."""
    attribution = (
        "Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model "
        "License Agreement.\n\n"
        if is_apples(text)
        else ""
    )
    integers = ", ".join(f"{rule} as {rule.scheme}" for rule in recipe.quantize if rule.scheme != "float")
    quantized = f"These layers are stored as integers: {integers}.\n" if integers else ""
    return (
        f"{attribution}This {made} is a derivative of a FastVLM model; its license is in {license}.\n\n"
        "Modifications: BatchNorm and LayerScale of the image encoder were folded into the weights beside "
        f"them, the model was converted to the formats in this {made}, and its weights are stored as "
        f"{recipe.vision.storage} (image encoder, projector), {recipe.embed.storage} (embedding) and "
        f"{recipe.decoder.storage} (decoder), by fastvlm-convert with the recipe '{recipe.name}'.\n"
        f"{quantized}"
    )
