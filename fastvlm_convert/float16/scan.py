"""Scan the reference's activations on real pictures against float16's range."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.float16.report import FP16_SMALLEST, OpRange, RangeReport
from fastvlm_convert.generate import generate
from fastvlm_convert.io_names import decoder_op, op_component, vision_op
from fastvlm_convert.model.decoder import DecoderLayer, Qwen2
from fastvlm_convert.model.fastvlm import FastVLM
from fastvlm_convert.model.vision import AttentionBlock, RepMixerBlock, Stage
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel


@dataclass
class _Seen:
    max_abs: float = 0.0
    flushed: int = 0
    non_zero: int = 0


class _Recorder(TorchFunctionMode):
    """Collects ranges by op name: through hooks, and for attention scores by watching the fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, _Seen] = {}
        self.attention = ""  # op name of the attention that runs now

    def record(self, op: str, values: Tensor) -> None:
        entry = self.seen.setdefault(op, _Seen())
        magnitude = values.abs()
        largest = float(magnitude.max())
        if not math.isfinite(largest):
            raise CheckpointError(
                f"operation '{op}' gives NaN or infinity in float32 already",
                hint="the checkpoint is damaged or its training diverged",
            )
        entry.max_abs = max(entry.max_abs, largest)
        non_zero = magnitude > 0
        entry.non_zero += int(non_zero.sum())
        entry.flushed += int((non_zero & (magnitude <= FP16_SMALLEST / 2)).sum())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and self.attention:
            query, key = args[0], args[1]
            group = query.shape[1] // key.shape[1]
            scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2)
            self.record(f"{self.attention}_scores", scores)  # before they are divided by sqrt(head_dim)
            if op_component(self.attention) == "decoder":
                layer = self.attention.removesuffix("attn")
                self.record(f"{layer}q_rotated", query)
                self.record(f"{layer}k_rotated", key)
        return func(*args, **kwargs)


def scan(
    model: FastVLM,
    loaded: LoadedModel,
    questions: Sequence[Question],
    checkpoint_sha256: str,
    max_new_tokens: int,
    on_progress: OnShare = ignore_share,
) -> RangeReport:
    """Answer questions with the reference and record what every operation gave.

    Args:
        model: The reference with folded weights, which are what programs compute with.
        loaded: The same model, ready to answer.
        questions: Pictures and questions.
        checkpoint_sha256: The checkpoint's hash.
        max_new_tokens: Longest answer.
        on_progress: Called with the share of the questions done, 0..1.
    """
    recorder = _Recorder()
    hooks = _Hooks(recorder)
    try:
        _attach_vision(hooks, model)
        _attach_decoder(hooks, model.decoder)
        with recorder:
            for number, question in enumerate(questions):
                prompt = loaded.conversation(question.messages)
                generate(loaded.session, prompt, loaded.eos_token_ids, max_new_tokens)
                on_progress((number + 1) / len(questions))
    finally:
        hooks.remove()
    ops = tuple(
        OpRange(name, seen.max_abs, seen.flushed / max(1, seen.non_zero))
        for name, seen in recorder.seen.items()
    )
    return RangeReport(checkpoint_sha256, len(questions), ops)


class _Hooks:
    """Hooks on the model's modules that tell a recorder what goes in and out."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._handles: list[Any] = []

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def output(self, module: nn.Module, op: str) -> None:
        record = self._recorder.record
        self._handles.append(module.register_forward_hook(lambda _m, _i, y: record(op, y)))

    def without_bias(self, linear: nn.Module, op: str) -> None:
        record = self._recorder.record
        self._handles.append(linear.register_forward_hook(lambda m, _i, y: record(op, y - m.bias)))

    def first_input(self, module: nn.Module, op: str) -> None:
        record = self._recorder.record
        self._handles.append(module.register_forward_pre_hook(lambda _m, x: record(op, x[0])))

    def attention(self, module: nn.Module, op: str) -> None:
        """Tell the recorder whose attention runs."""

        def enter(_module: nn.Module, _inputs: Any) -> None:  # noqa: ANN401
            self._recorder.attention = op

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:  # noqa: ANN401
            self._recorder.attention = ""

        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave))


def _attach_vision(hooks: _Hooks, model: FastVLM) -> None:
    for i, conv in enumerate(model.vision.stem):
        hooks.output(conv, f"stem_{i}")
    for s, stage in enumerate(model.vision.stages):
        assert isinstance(stage, Stage)
        for i, conv in enumerate(stage.downsample or ()):
            hooks.output(conv, f"s{s}_down_{i}")
        if stage.position is not None:
            hooks.output(stage.position, f"s{s}_position")
        for b, block in enumerate(stage.blocks):
            assert isinstance(block, RepMixerBlock | AttentionBlock)
            if isinstance(block, RepMixerBlock):
                hooks.output(block.mixer, vision_op(s, b, "mixer"))
            else:
                hooks.first_input(block.ffn, vision_op(s, b, "attn_residual"))
                hooks.output(block.norm, vision_op(s, b, "norm"))
                hooks.output(block.attention.qkv, vision_op(s, b, "qkv"))
                hooks.output(block.attention.proj, vision_op(s, b, "proj"))
                hooks.attention(block.attention, vision_op(s, b, "attn"))
            hooks.output(block.ffn.conv, vision_op(s, b, "ffn_conv"))
            hooks.output(block.ffn.fc1, vision_op(s, b, "fc1"))
            hooks.output(block.ffn.fc2, vision_op(s, b, "fc2"))
            hooks.output(block, vision_op(s, b, "residual"))
    hooks.output(model.vision.final.conv, "final")
    hooks.output(model.vision.final.se, "se_scaled")
    hooks.output(model.projector.fc1, "projector_fc1")
    hooks.output(model.projector.fc2, "projector_fc2")


def _attach_decoder(hooks: _Hooks, decoder: Qwen2) -> None:
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        hooks.output(layer.input_layernorm, decoder_op(i, "attn_norm"))
        for proj in "qkv":
            hooks.output(getattr(layer.self_attn, f"{proj}_proj"), decoder_op(i, "qkv"))
        hooks.output(layer.self_attn.v_proj, decoder_op(i, "v_heads"))
        hooks.without_bias(layer.self_attn.k_proj, decoder_op(i, "k_unbiased"))
        hooks.output(layer.self_attn.o_proj, decoder_op(i, "o"))
        hooks.attention(layer.self_attn, decoder_op(i, "attn"))
        hooks.first_input(layer.post_attention_layernorm, decoder_op(i, "attn_residual"))
        hooks.output(layer.post_attention_layernorm, decoder_op(i, "mlp_norm"))
        hooks.output(layer.mlp.gate_proj, decoder_op(i, "gate"))
        hooks.output(layer.mlp.up_proj, decoder_op(i, "up"))
        hooks.first_input(layer.mlp.down_proj, decoder_op(i, "gated"))
        hooks.output(layer.mlp.down_proj, decoder_op(i, "down"))
        hooks.output(layer, decoder_op(i, "residual"))
    hooks.output(decoder.norm, "final_norm")
    hooks.output(decoder, "logits")
