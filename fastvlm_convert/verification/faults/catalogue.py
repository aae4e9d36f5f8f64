"""Every fault that is planted."""

from typing import Final

from fastvlm_convert.verification.faults import (
    apps,
    client_files,
    coreml_programs,
    onnx_graphs,
    positions,
    weights,
)
from fastvlm_convert.verification.faults.fault import BUNDLE, EVERY_TARGET, Fault

FAULTS: Final[tuple[Fault, ...]] = (
    Fault("crop-for-pad", "pictures are cropped, not padded, or padded, not cropped", {
        EVERY_TARGET: apps.crop_for_pad,
        BUNDLE: client_files.change_image_mode,
    }),
    Fault("channels-swapped", "the encoder's first convolution reads blue for red", {
        "onnx": weights.swap_channels,
        "coreml": weights.swap_channels,
    }),
    Fault("channels-swapped-by-app", "the app hands pictures over as blue, green, red", {
        EVERY_TARGET: apps.swap_channels,
    }),
    Fault("channels-said-swapped", "a file says that pictures are blue, green, red", {
        BUNDLE: client_files.flip_channels,
        "coreml": coreml_programs.swap_picture_channels,
    }),
    Fault("mean-std", "pictures are normalized with another mean and deviation", {
        BUNDLE: client_files.normalize,
        EVERY_TARGET: apps.normalize,
    }),
    Fault("no-rescale", "pixels of 0 to 255 are not scaled to 0 to 1", {
        BUNDLE: client_files.forget_rescaling,
        EVERY_TARGET: apps.forget_rescaling,
    }),
    Fault("crop-size", "a smaller square is cut from pictures", {
        BUNDLE: client_files.change_crop_size,
    }),
    Fault("conv-bias-zeroed", "one convolution of the encoder has lost its bias", {
        "onnx": weights.zero_bias,
        "coreml": weights.zero_bias,
    }),
    Fault("scales-permuted", "one layer's scales belong to the rows before theirs", {
        "onnx": weights.permute_scales,
        "coreml": weights.permute_scales,
    }),
    Fault("activation-scale", "one convolution rounds what it gives in steps 10 % too wide", {
        "onnx": onnx_graphs.widen_activations,
        "coreml": coreml_programs.widen_activations,
    }, absent="its activations are floats"),
    Fault("nibbles-swapped", "the two integers in each byte of one layer are swapped", {
        "onnx": weights.swap_nibbles,
        "coreml": weights.swap_nibbles,
    }),
    Fault("zero-points-off-by-one", "one layer's zero points are one too high", {
        "onnx": weights.shift_zero_points,
        "coreml": weights.shift_zero_points,
    }),
    Fault("head-tied-wrongly", "the head reads its table one row late", {
        "onnx": weights.mistie_head,
        "coreml": weights.mistie_head,
    }),
    Fault("rope-base", "rotary tables are computed with another model's base", {
        "onnx": positions.change_rope_base,
        "coreml": positions.change_rope_base,
    }),
    Fault("rotary-beyond-256", "rotary tables repeat position 255 for all that follow", {
        "onnx": positions.freeze_rotary,
        "coreml": positions.freeze_rotary,
    }),
    Fault("position-off-by-one", "the app decodes from one position too late", {
        EVERY_TARGET: positions.skip_position,
    }),
    Fault("cache-slot-reused", "the app decodes from the position of the prompt's last token", {
        EVERY_TARGET: positions.repeat_position,
    }),
    Fault("cache-slot-overwritten", "the first slot of one layer's cache is overwritten", {
        "onnx": onnx_graphs.overwrite_slot,
        "coreml": coreml_programs.overwrite_slot,
    }),
    Fault("state-not-reset", "the app does not clear the cache before the next sequence", {
        "coreml": positions.keep_state,
        EVERY_TARGET: positions.keep_position,
    }),
    Fault("prompt-order", "the question stands before the picture", {
        EVERY_TARGET: apps.text_before_picture,
    }),
    Fault("prompt", "the prompt is another one, in the contract and in what packages say", {
        BUNDLE: client_files.change_prompt,
        "coreml": coreml_programs.change_prompt,
    }),
    Fault("chat-template", "the chat template writes another prompt", {
        BUNDLE: client_files.change_chat_template,
    }),
    Fault("merge-dropped", "the tokenizer's last merge is missing", {
        BUNDLE: client_files.drop_merge,
    }),
    Fault("eos", "answers end at another token", {
        BUNDLE: client_files.change_end_token,
    }),
    Fault("accuracy-level", "quantized products round their activations as the recipe does not say", {
        "onnx": onnx_graphs.change_accuracy_level,
    }, absent="its operations have no such setting"),
)  # fmt: skip
