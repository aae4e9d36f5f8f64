"""Names of Apple's and transformers' checkpoints, mapped to ours. Pure functions of names.

Ours follow the paper: `vision.stem`, `vision.stages.S.{downsample,position,blocks.B}`, `vision.final`,
`projector.fc1/fc2`, `decoder.*` (Qwen2's own names). Train-time branches get one name for both layouts,
see `weights/reparameterize.py`.
"""

import re
from collections.abc import Callable, Iterable
from typing import Final, Literal

Layout = Literal["llava_qwen2", "fast_vlm"]
LAYOUTS: Final[tuple[Layout, ...]] = ("llava_qwen2", "fast_vlm")

APPLE_VISION: Final = "model.vision_tower.vision_tower.model."
TIMM_VISION: Final = "model.vision_tower.timm_model."

# The same module has two names in the two code bases; the right-hand side is ours.
_MODULES: Final = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\.token_mixer\.(qkv|proj)\.", r".attention.\1."),
        (r"\.token_mixer\.", ".mixer."),
        (r"\.(?:convffn|mlp)\.conv\.", ".ffn."),
        (r"\.(?:convffn|mlp)\.", ".ffn."),
        (r"\.layer_scale_1(?:\.gamma)?$", ".attention_scale"),
        (r"\.layer_scale_2(?:\.gamma)?$", ".ffn_scale"),
        (r"(\.mixer\.layer_scale)\.gamma$", r"\1"),
        (r"(\.blocks\.\d+)\.layer_scale(?:\.gamma)?$", r"\1.ffn_scale"),
        (r"\.(?:reparam_conv|lkb_reparam)\.", "."),
        (r"\.(?:rbr_conv|conv_kxk)\.", ".branches."),
        (r"\.(?:rbr_scale|conv_scale)\.", ".pointwise."),
        (r"\.rbr_skip\.", ".identity."),
        (r"\.(?:lkb_origin|large_conv)\.", ".large."),
        (r"\.small_conv\.", ".small."),
        (r"\.position\.(?:pe|pos_enc)\.", ".position.position_conv."),
        (r"^vision\.final\.(?!se\.)", "vision.final.conv."),
        (r"\.se\.fc1\.", ".se.reduce."),
        (r"\.se\.fc2\.", ".se.expand."),
    ]
]


def layout_of(names: Iterable[str]) -> Layout | None:
    """Whose names they are, by the encoder's; None where neither code base has such names."""
    for name in names:
        if name.startswith(APPLE_VISION):
            return "llava_qwen2"
        if name.startswith(TIMM_VISION):
            return "fast_vlm"
    return None


def canonical_names(names: Iterable[str], layout: Layout) -> dict[str, str]:
    """Map stored names to ours; names that belong to no part of the model are left out.

    Args:
        names: Tensor names as stored.
        layout: Whose names they are.
    """
    names = list(names)
    place = _apple_place(names) if layout == "llava_qwen2" else _timm_place
    mapped = {}
    for name in names:
        text = _text_name(name, layout)
        ours = text if text is not None else place(name)
        if ours is not None:
            mapped[name] = ours
    return mapped


def _text_name(name: str, layout: Layout) -> str | None:
    if layout == "llava_qwen2":
        text, projector, first, second = "model.", "model.mm_projector.", "0", "2"
    else:
        text, projector = "model.language_model.", "model.multi_modal_projector."
        first, second = "linear_1", "linear_2"
    for module, ours in ((first, "fc1"), (second, "fc2")):
        if name.startswith(f"{projector}{module}."):
            return f"projector.{ours}.{name.removeprefix(f'{projector}{module}.')}"
    if name.startswith("lm_head."):
        return f"decoder.{name}"
    rest = name.removeprefix(text)
    if rest != name and re.match(r"(embed_tokens|norm|layers\.\d+)\.", rest):
        return f"decoder.{rest}"
    return None


def _rename_modules(name: str) -> str | None:
    for pattern, replacement in _MODULES:
        name = pattern.sub(replacement, name)
    return None if name.endswith("num_batches_tracked") else name


def _timm_place(name: str) -> str | None:
    rest = name.removeprefix(TIMM_VISION)
    if rest == name:
        return None
    for pattern, ours in (
        (r"stem\.(\d+)\.", r"vision.stem.\1."),
        (r"stages\.(\d+)\.downsample\.proj\.(\d+)\.", r"vision.stages.\1.downsample.\2."),
        (r"stages\.(\d+)\.pos_emb\.", r"vision.stages.\1.position."),
        (r"stages\.(\d+)\.blocks\.(\d+)\.", r"vision.stages.\1.blocks.\2."),
        (r"final_conv\.", "vision.final."),
    ):
        placed, count = re.subn(f"^{pattern}", ours, rest)
        if count:
            return _rename_modules(placed)
    return None


def _apple_place(names: list[str]) -> Callable[[str], str | None]:
    """Apple numbers blocks, downsamplings and position encodings in one list, `network`."""
    entry = re.compile(rf"^{re.escape(APPLE_VISION)}network\.(\d{{1,6}})\.(?:(proj)\.|\d+\.)?")
    downsamplings = sorted({int(m[1]) for n in names if (m := entry.match(n)) and m[2]})

    def place(name: str) -> str | None:
        rest = name.removeprefix(APPLE_VISION)
        if rest == name:
            return None
        for pattern, ours in (
            (r"patch_embed\.(\d+)\.", r"vision.stem.\1."),
            (r"conv_exp\.", "vision.final."),
        ):
            placed, count = re.subn(f"^{pattern}", ours, rest)
            if count:
                return _rename_modules(placed)
        match = re.match(r"network\.(\d{1,6})\.(.+)$", rest)
        if match is None:
            return None
        stage = sum(d <= int(match[1]) for d in downsamplings)
        inner = match[2]
        if inner.startswith("proj."):
            inner = inner.replace("proj.", "downsample.", 1)
        elif re.match(r"\d+\.", inner):
            inner = f"blocks.{inner}"
        else:
            inner = f"position.{inner}"
        return _rename_modules(f"vision.stages.{stage}.{inner}")

    return place
