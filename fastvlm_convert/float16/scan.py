"""Scan the reference's activations on real pictures against float16's range."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.float16.report import FP16_SMALLEST, OpRange, RangeReport
from fastvlm_convert.generate import generate
from fastvlm_convert.io_names import decoder_op, op_component, vision_op
from fastvlm_convert.model.decoder import DecoderLayer
from fastvlm_convert.model.fastvlm import FastVLM
from fastvlm_convert.model.observe import Hooks, observed
from fastvlm_convert.model.vision import AttentionBlock, Stage
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

    def observe(self, op: str, values: Tensor) -> None:
        """Record what an operation gave; queries, keys and values are one product in programs."""
        part = op[-2:] if op_component(op) == "decoder" else ""
        if part in ("_q", "_k", "_v"):
            self.record(f"{op[:-2]}_qkv", values)
        if part == "_v":
            self.record(f"{op}_heads", values)
        elif part not in ("_q", "_k"):
            self.record(op, values)

    def enter(self, attention: str) -> None:
        self.attention = attention

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
    with recorded(model) as ranges:
        for number, question in enumerate(questions):
            prompt = loaded.conversation(question.messages)
            generate(loaded.session, prompt, loaded.eos_token_ids, max_new_tokens)
            on_progress((number + 1) / len(questions))
    return RangeReport(checkpoint_sha256, len(questions), ranges())


@contextmanager
def recorded(model: FastVLM) -> Iterator[Callable[[], tuple[OpRange, ...]]]:
    """Record what every operation gives while the model runs.

    Yields:
        A function that gives the ranges so far.

    Raises:
        CheckpointError: An operation gives NaN or infinity.
    """
    recorder = _Recorder()
    hooks = Hooks()
    try:
        _attach_attention(hooks, recorder, model)
        with observed(model, recorder.observe), recorder:
            yield lambda: tuple(
                OpRange(name, seen.max_abs, seen.flushed / max(1, seen.non_zero))
                for name, seen in recorder.seen.items()
            )
    finally:
        hooks.remove()


def _attach_attention(hooks: Hooks, recorder: _Recorder, model: FastVLM) -> None:
    """Tell the recorder whose attention runs, and show it keys without their bias."""

    def around(module: nn.Module, op: str) -> None:
        hooks.around(module, lambda: recorder.enter(op), lambda: recorder.enter(""))

    for s, stage in enumerate(model.vision.stages):
        assert isinstance(stage, Stage)
        for b, block in enumerate(stage.blocks):
            if isinstance(block, AttentionBlock):
                around(block.attention, vision_op(s, b, "attn"))
    for i, layer in enumerate(model.decoder.layers):
        assert isinstance(layer, DecoderLayer)
        around(layer.self_attn, decoder_op(i, "attn"))
        key, name = layer.self_attn.k_proj, decoder_op(i, "k_unbiased")
        hooks.output(key, lambda y, bias=key.bias, name=name: recorder.record(name, y - bias))  # type: ignore[misc]
