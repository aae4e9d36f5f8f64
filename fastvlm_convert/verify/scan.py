"""Scan the reference's activations on real pictures against float16's range."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastvlm_convert.contract import decoder_op, vision_op
from fastvlm_convert.decode import generate
from fastvlm_convert.fp16_range import FP16_SMALLEST, OpRange, RangeReport
from fastvlm_convert.model.decoder import DecoderLayer
from fastvlm_convert.model.fastvlm import FastVLM
from fastvlm_convert.model.vision import AttentionBlock, RepMixerBlock, Stage
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel

OnProgress = Callable[[float], None]


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
        entry.max_abs = max(entry.max_abs, float(magnitude.max()))
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
        return func(*args, **kwargs)


def scan(
    model: FastVLM,
    loaded: LoadedModel,
    questions: Sequence[Question],
    checkpoint_sha256: str,
    max_new_tokens: int,
    on_progress: OnProgress = lambda share: None,
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
    handles = _attach(model, recorder)
    try:
        with recorder:
            for number, question in enumerate(questions):
                prompt = loaded.prompt(question.text, [question.image])
                generate(loaded.session, prompt, loaded.eos_token_ids, max_new_tokens)
                on_progress((number + 1) / len(questions))
    finally:
        for handle in handles:
            handle.remove()
    ops = tuple(
        OpRange(name, seen.max_abs, seen.flushed / max(1, seen.non_zero))
        for name, seen in recorder.seen.items()
    )
    return RangeReport(checkpoint_sha256, len(questions), ops)


def _attach(model: FastVLM, recorder: _Recorder) -> list[Any]:
    handles: list[Any] = []

    def output(module: nn.Module, op: str) -> None:
        handles.append(module.register_forward_hook(lambda _m, _i, y: recorder.record(op, y)))

    def first_input(module: nn.Module, op: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda _m, x: recorder.record(op, x[0])))

    def attention(module: nn.Module, op: str) -> None:
        def enter(_module: nn.Module, _inputs: Any) -> None:  # noqa: ANN401
            recorder.attention = op

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:  # noqa: ANN401
            recorder.attention = ""

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    for i, conv in enumerate(model.vision.stem):
        output(conv, f"stem_{i}")
    for s, stage in enumerate(model.vision.stages):
        assert isinstance(stage, Stage)
        for i, conv in enumerate(stage.downsample or ()):
            output(conv, f"s{s}_down_{i}")
        if stage.position is not None:
            output(stage.position, f"s{s}_position")
        for b, block in enumerate(stage.blocks):
            assert isinstance(block, RepMixerBlock | AttentionBlock)
            if isinstance(block, RepMixerBlock):
                output(block.mixer, vision_op(s, b, "mixer"))
            else:
                first_input(block.ffn, vision_op(s, b, "attn_residual"))
                output(block.norm, vision_op(s, b, "norm"))
                output(block.attention.qkv, vision_op(s, b, "qkv"))
                output(block.attention.proj, vision_op(s, b, "proj"))
                attention(block.attention, vision_op(s, b, "attn"))
            output(block.ffn.conv, vision_op(s, b, "ffn_conv"))
            output(block.ffn.fc1, vision_op(s, b, "fc1"))
            output(block.ffn.fc2, vision_op(s, b, "fc2"))
            output(block, vision_op(s, b, "residual"))
    output(model.vision.final.conv, "final")
    output(model.vision.final.se, "se_scaled")
    output(model.projector.fc1, "projector_fc1")
    output(model.projector.fc2, "projector_fc2")
    for i, layer in enumerate(model.decoder.layers):
        assert isinstance(layer, DecoderLayer)
        output(layer.input_layernorm, decoder_op(i, "attn_norm"))
        for proj in "qkv":
            output(getattr(layer.self_attn, f"{proj}_proj"), decoder_op(i, "qkv"))
        output(layer.self_attn.o_proj, decoder_op(i, "o"))
        attention(layer.self_attn, decoder_op(i, "attn"))
        first_input(layer.post_attention_layernorm, decoder_op(i, "attn_residual"))
        output(layer.post_attention_layernorm, decoder_op(i, "mlp_norm"))
        output(layer.mlp.gate_proj, decoder_op(i, "gate"))
        output(layer.mlp.up_proj, decoder_op(i, "up"))
        first_input(layer.mlp.down_proj, decoder_op(i, "gated"))
        output(layer.mlp.down_proj, decoder_op(i, "down"))
        output(layer, decoder_op(i, "residual"))
    output(model.decoder.norm, "final_norm")
    output(model.decoder, "logits")
    return handles
