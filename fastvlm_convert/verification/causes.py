"""Likely causes of a broken gate: a catalogue, each entry a function of what was found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.io_names import op_component
from fastvlm_convert.manifest import Contract
from fastvlm_convert.verification.check import Check
from fastvlm_convert.verification.layers import Divergence, Layers

_CLEARLY_DB: Final = 20.0  # by which one explanation must be better than another
_TOO_LARGE: Final = 1.5  # times the size that the recipe leads to
_IMAGE_FIELDS: Final = ("image_size", "resampling", "rescale_factor", "image_mean", "image_std")
# What preprocessor_config.json, processor_config.json and config.json say of the same.
_MODE_KEYS: Final = ("image_mode", "image_aspect_ratio", "do_center_crop", "do_pad")
_PICTURE_KEYS: Final = (*_IMAGE_FIELDS, "do_rescale", "do_normalize", "crop_size", "resample")
_LOGITS: Final = ("prefill_logits", "decode_logits")


@dataclass(frozen=True)
class Evidence:
    """What is known when a gate of a target broke.

    Attributes:
        target: The target, `weights`, or `bundle` for what all targets share.
        checks: Its checks and those of the bundle.
        layers: Its operations, where they could be seen.
        divergence: The first of them below its gate.
        contract: What the bundle promises.
        expected: What an export of the reference would promise.
        is_head_tied: Whether the reference's head is its embedding table.
        is_quantized: Whether the recipe stores integers.
        is_calibrated: Whether the reference's integers were solved here, with data.
        is_same_source: Whether the bundle was made from the reference's files.
        sizes: Bytes of its files as they should be and as they are.
        trouble: The operation that first gave NaN or infinity, where the runtime tells.
    """

    target: str
    checks: Sequence[Check]
    layers: Layers | None
    divergence: Divergence | None
    contract: Contract
    expected: Contract
    is_head_tied: bool
    is_quantized: bool
    is_calibrated: bool
    is_same_source: bool
    sizes: Mapping[str, tuple[int, int]]
    trouble: str | None

    def failed(self, stage: str, metric: str | None = None) -> bool:
        """Whether a check of its own failed."""
        return any(
            c.status == "failed" and c.stage == stage and metric in (None, c.metric)
            for c in self.checks
            if c.target == self.target
        )

    def passed(self, stage: str) -> bool:
        """Whether its checks of a stage were run and all passed."""
        found = [c.status for c in self.checks if c.target == self.target and c.stage == stage]
        return bool(found) and set(found) == {"passed"}

    def says(self, *words: str, stage: str | None = None) -> bool:
        """Whether a failed check of the bundle or the target names one of these in its reason."""
        reasons = [
            c.reason or ""
            for c in self.checks
            if c.status == "failed" and c.target in ("bundle", self.target) and stage in (None, c.stage)
        ]
        return any(word in reason for reason in reasons for word in words)


Cause = Callable[[Evidence], str | None]


def file_changed(found: Evidence) -> str | None:
    """A file is not what was exported."""
    changed = next((c for c in found.checks if c.stage == "files" and c.status == "failed"), None)
    return (
        None if changed is None else f"a file was changed after the export ({changed.reason}): export again"
    )


def another_reference(found: Evidence) -> str | None:
    """The bundle was made from another checkpoint."""
    if found.is_same_source:
        return None
    return "the bundle was made from other files than this reference: give the checkpoint it was made from"


def image_mode(found: Evidence) -> str | None:
    """Pictures are cropped where they should be padded, or the like."""
    ours, theirs = found.contract.image_mode, found.expected.image_mode
    if ours != theirs:
        return f"wrong image mode: the bundle makes pictures square by '{ours}', the checkpoint by '{theirs}'"
    if found.target == "bundle" and found.says(*_MODE_KEYS):
        return "wrong image mode: clients would make pictures square in another way than the checkpoint"
    return None


def picture_settings(found: Evidence) -> str | None:
    """Pictures are scaled or normalized otherwise."""
    names = [n for n in _IMAGE_FIELDS if getattr(found.contract, n) != getattr(found.expected, n)]
    if names:
        return f"pictures are prepared otherwise than for the checkpoint: {', '.join(names)}"
    if found.target == "bundle" and found.says(*_PICTURE_KEYS):
        return "clients would scale or normalize pictures otherwise than the checkpoint"
    return None


def channels_swapped(found: Evidence) -> str | None:
    """Blue is taken for red."""
    if found.says("BGR", "do_flip_channel_order"):
        return "the channels of pictures are swapped: blue, green, red where red, green, blue is meant"
    swapped = None if found.layers is None else found.layers.swapped_features_db
    own = _worst(found, "image_features")
    if swapped is None or own is None or swapped < own + _CLEARLY_DB:
        return None
    return (
        f"the encoder takes blue for red: with the channels of the picture swapped, its features have "
        f"{swapped:.1f} dB"
    )


def tokenizer(found: Evidence) -> str | None:
    """Text becomes other tokens."""
    if not any(c.stage == "tokenizer.json" and c.status == "failed" for c in found.checks):
        return None
    if found.target != "bundle" and not found.failed("preprocessing", "token_ids"):
        return None
    return "the tokenizer is not the checkpoint's: a vocabulary, a merge or a rule differs"


def prompt(found: Evidence) -> str | None:
    """The prompt's text or order differs."""
    ours, theirs = found.contract, found.expected
    if (ours.prompt, ours.conversation) != (theirs.prompt, theirs.conversation):
        return "wrong prompt: the bundle's conversation format is not the checkpoint's"
    if found.says("chat_template"):
        return "wrong prompt: the chat template that clients read is not the checkpoint's"
    return None


def end_tokens(found: Evidence) -> str | None:
    """Answers end at another token."""
    ours, theirs = found.contract.eos_token_ids, found.expected.eos_token_ids
    if ours != theirs or found.says("eos_token_id"):
        return "wrong end tokens: answers would stop too early or run on"
    return None


def not_quantized(found: Evidence) -> str | None:
    """A file holds floats where the recipe stores integers."""
    large = [name for name, (want, have) in found.sizes.items() if have > _TOO_LARGE * want]
    if not found.is_quantized or not large:
        return None
    want, have = found.sizes[large[0]]
    return f"file not quantized: {large[0]} has {have} bytes, the recipe leads to {want}"


def float16_overflow(found: Evidence) -> str | None:
    """Numbers beyond float16's range."""
    if any(c.stage == "activations" and c.status == "failed" for c in found.checks):
        return "float16 overflows: activations of the reference exceed 65504; `scan` writes a repaired recipe"
    if found.trouble is not None:
        return f"numbers overflow: {found.trouble}"
    if found.divergence is not None and found.divergence.reason.startswith("NaN"):
        return f"numbers overflow: {found.divergence.layer} is the first operation with NaN or infinity"
    return None


def embedding_table(found: Evidence) -> str | None:
    """Tokens become other vectors."""
    if found.failed("inputs_embeds"):
        return "the embedding table is not the checkpoint's, or its rows are in another order"
    return None


def head_tied(found: Evidence) -> str | None:
    """The head reads the wrong table."""
    if found.divergence is None or found.divergence.layer != "logits" or not _breaks_off(found):
        return None
    if found.is_head_tied:
        return (
            "the head alone is wrong: the checkpoint ties it to the embedding table, the bundle reads another"
        )
    return "the head alone is wrong: tied to the embedding table, perhaps; the checkpoint has one of its own"


def rotary_positions(found: Evidence) -> str | None:
    """Attention sees tokens at the wrong positions."""
    if found.divergence is None or found.layers is None or not found.divergence.layer.endswith("_o"):
        return None
    if op_component(found.divergence.layer) != "decoder":
        return None
    first = found.layers.first_token.get(found.divergence.layer, float("-inf"))
    here = next(f.decibels for f in found.layers.figures if f.name == found.divergence.layer)
    if first < here + _CLEARLY_DB:
        return None
    return (
        f"rope base, rotary tables or mask: {found.divergence.layer} is right for the first token, which no "
        "rotation changes, and wrong after it"
    )


def solved_elsewhere(found: Evidence) -> str | None:
    """Both have integers of their own, solved with data."""
    if not found.is_calibrated or found.divergence is None or op_component(found.divergence.layer) == "embed":
        return None
    return (
        f"from {found.divergence.layer} on the integers may be others: another processor, number of threads "
        "or library version solves a calibrated recipe otherwise. Give the quantized checkpoint that the "
        "bundle was made from as the reference; if that fails too, weights are wrong"
    )


def layer_weights(found: Evidence) -> str | None:
    """One operation has other weights."""
    if found.divergence is None or not _breaks_off(found):
        return None
    return (
        f"{found.divergence.layer} is the first operation that is wrong: its weights are not the "
        "checkpoint's (values, scales or zero points differ, or their order), or it computes something else"
    )


def growing_error(found: Evidence) -> str | None:
    """No operation is wrong, all of them together are too coarse."""
    if found.divergence is None or _breaks_off(found):
        return None
    return (
        f"the error grows from operation to operation and is below the gate at {found.divergence.layer}: "
        "rounding (float16, int8 activations), not one wrong weight"
    )


def cache(found: Evidence) -> str | None:
    """The prompt is right, what follows is not."""
    if not found.failed("decode_logits") or not found.passed("prefill_logits"):
        return None
    return (
        "the prompt is right and the tokens after it are not: the cache overwrites or skips a slot, a "
        "position is off, or the function for one token has other weights"
    )


def late_positions(found: Evidence) -> str | None:
    """Only the end of the context is wrong."""
    if not found.failed("context_end") or any(found.failed(stage) for stage in _LOGITS):
        return None
    return "late positions alone are wrong: rotary tables that are too short, the mask, or the cache's end"


def coarse_recipe(found: Evidence) -> str | None:
    """The integers themselves cost too much."""
    if found.target != "weights":
        return None
    return "the recipe is too coarse for this checkpoint: more bits, smaller blocks, or calibration"


def runtime_rounding(found: Evidence) -> str | None:
    """The program is right, the runtime's shortcuts are too coarse."""
    if found.failed("decoder", "accuracy_level"):
        return "products round activations otherwise than the recipe says (onnx.accuracy_level)"
    if not found.failed("end_to_end") or found.divergence is not None:
        return None
    if any(found.failed(stage) for stage in ("preprocessing", "image_features", "inputs_embeds", *_LOGITS)):
        return None
    return (
        "every stage is right and the answers still drift: the runtime rounds activations too coarsely "
        "(onnx.accuracy_level, float16)"
    )


_CLIENT_FILES: Final = "client files"  # stands for every stage of the bundle but its hashes
_PREPARED: Final = (_CLIENT_FILES, "preprocessing")
_DECODER: Final = (*_LOGITS, "context_end", "end_to_end", "greedy_text")
_NUMERIC: Final = ("image_features", "inputs_embeds", *_DECODER)
_CAUSES: Final[tuple[tuple[str, tuple[str, ...], Cause], ...]] = (
    ("file_changed", ("files",), file_changed),
    ("coarse_recipe", ("end_to_end",), coarse_recipe),
    ("another_reference", (*_PREPARED, *_NUMERIC), another_reference),
    ("image_mode", _PREPARED, image_mode),
    ("picture_settings", _PREPARED, picture_settings),
    ("channels_swapped", (*_PREPARED, "vision", "image_features"), channels_swapped),
    ("tokenizer", _PREPARED, tokenizer),
    ("prompt", (*_PREPARED, "decoder"), prompt),
    ("end_tokens", (_CLIENT_FILES, "greedy_text", "end_to_end"), end_tokens),
    ("not_quantized", _NUMERIC, not_quantized),
    ("float16_overflow", ("activations", *_NUMERIC), float16_overflow),
    ("embedding_table", ("inputs_embeds",), embedding_table),
    ("head_tied", _DECODER, head_tied),
    ("rotary_positions", _DECODER, rotary_positions),
    ("solved_elsewhere", _NUMERIC, solved_elsewhere),
    ("layer_weights", _NUMERIC, layer_weights),
    ("growing_error", _NUMERIC, growing_error),
    ("cache", ("decode_logits",), cache),
    ("late_positions", ("context_end",), late_positions),
    ("runtime_rounding", ("decoder", "end_to_end"), runtime_rounding),
)
# Name, the stages whose gates it can break, and function; the surest first.
CAUSES: Final = tuple(name for name, _, _ in _CAUSES)
"""The names of all causes."""


def likely_cause(found: Evidence, stage: str) -> tuple[str, str] | None:
    """Name and words of the first cause that fits the evidence, or None.

    Args:
        found: The evidence.
        stage: The first stage that breaks its gate.
    """
    own = found.target == "bundle" and stage not in ("files", "activations")
    place = _CLIENT_FILES if own else stage
    for name, stages, cause in _CAUSES:
        if place in stages and (text := cause(found)) is not None:
            return name, text
    return None


def _breaks_off(found: Evidence) -> bool:
    """Whether the first operation below its gate is clearly worse than all before it in its graph."""
    assert found.divergence is not None
    assert found.layers is not None
    part, before = op_component(found.divergence.layer), float("inf")
    for figure in found.layers.figures:
        if figure.name == found.divergence.layer:
            return figure.decibels < before - _CLEARLY_DB
        if op_component(figure.name) == part and figure.is_run:
            before = min(before, figure.decibels)
    return False


def _worst(found: Evidence, stage: str) -> float | None:
    values = [c.value for c in found.checks if c.target == found.target and c.stage == stage]
    known = [v for v in values if v is not None]
    return min(known) if known else None
