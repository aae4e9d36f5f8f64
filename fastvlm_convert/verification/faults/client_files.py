"""Faults in the files that clients read beside the artifacts, and in the manifest's contract."""

from collections.abc import Callable
from typing import Any, Final

from fastvlm_convert.manifest import FILE_NAME
from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.fault import NotApplicableError

_IMAGES: Final = "preprocessor_config.json"
_GENERATION: Final = "generation_config.json"
_TOKENIZER: Final = "tokenizer.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
# Of CLIP, which most image processors default to.
_MEAN: Final = [0.48145466, 0.4578275, 0.40821073]
_STD: Final = [0.26862954, 0.26130258, 0.27577711]


def normalize(copy: Copy) -> None:
    """Normalize pictures with CLIP's mean and deviation, or not at all where they are these."""

    def change(settings: dict[str, Any]) -> None:
        is_clip = settings.get("image_mean") == _MEAN
        settings["image_mean"], settings["image_std"] = ([0.0] * 3, [1.0] * 3) if is_clip else (_MEAN, _STD)
        settings["do_normalize"] = True

    _edit(copy, _IMAGES, change)


def forget_rescaling(copy: Copy) -> None:
    """Tell clients not to rescale."""
    _edit(copy, _IMAGES, lambda settings: settings.update(do_rescale=not settings.get("do_rescale", True)))


def change_crop_size(copy: Copy) -> None:
    """Cut a smaller square from pictures."""
    size = copy.manifest.contract.image_size - 56
    _edit(copy, _IMAGES, lambda settings: settings.update(crop_size={"height": size, "width": size}))


def flip_channels(copy: Copy) -> None:
    """Tell clients to flip the order of channels."""
    _edit(copy, _IMAGES, lambda settings: settings.update(do_flip_channel_order=True))


def change_end_token(copy: Copy) -> None:
    """End answers at another token, in the contract as in the files."""
    ends = copy.manifest.contract.eos_token_ids
    wrong = next(token for token in range(len(ends) + 1) if token not in ends)
    _edit(copy, _GENERATION, lambda settings: settings.update(eos_token_id=wrong))
    copy.edit_json(FILE_NAME, lambda manifest: manifest["contract"].update(eos_token_ids=[wrong]))


def change_image_mode(copy: Copy) -> None:
    """Make pictures square in the other way, by the contract and by the recipe alike."""
    mode = "crop" if copy.manifest.contract.image_mode == "pad" else "pad"

    def change(manifest: dict[str, Any]) -> None:
        manifest["contract"]["image_mode"] = mode
        manifest["recipe"]["common"]["image_mode"] = mode

    copy.edit_json(FILE_NAME, change)


def change_prompt(copy: Copy) -> None:
    """Leave out what makes the model answer, wherever the contract says it."""

    def change(manifest: dict[str, Any]) -> None:
        contract = manifest["contract"]
        said = contract["conversation"]["generation"]
        contract["prompt"] = contract["prompt"].removesuffix(said) + said.rstrip("\n")
        contract["conversation"]["generation"] = said.rstrip("\n")

    if not copy.manifest.contract.conversation.generation.endswith("\n"):
        raise NotApplicableError("the prompt does not end with a line break")
    copy.edit_json(FILE_NAME, change)


def change_chat_template(copy: Copy) -> None:
    """Write turns without the line break behind a picture, or with one more."""
    image = copy.manifest.contract.conversation.image

    def change(settings: dict[str, Any]) -> None:
        template = str(settings["chat_template"])
        written = image.replace("\n", "\\n")
        wrong = written.removesuffix("\\n") if written.endswith("\\n") else f"{written}\\n"
        settings["chat_template"] = template.replace(written, wrong)
        if settings["chat_template"] == template:
            raise NotApplicableError("the chat template writes no picture")

    _edit(copy, _TOKENIZER_CONFIG, change)


def drop_merge(copy: Copy) -> None:
    """Drop the last merge of the tokenizer, which few texts need."""

    def change(tokenizer: dict[str, Any]) -> None:
        merges = tokenizer["model"].get("merges")
        if not merges:
            raise NotApplicableError("the tokenizer has no merges")
        merges.pop()

    _edit(copy, _TOKENIZER, change)


def _edit(copy: Copy, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    if name not in copy.manifest.files:
        raise NotApplicableError(f"the bundle has no {name}")
    copy.edit_json(name, change)
