"""What every operation of the reference gives, under the names that exporters give their operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastvlm_convert.io_names import decoder_op, vision_op
from fastvlm_convert.model.decoder import DecoderLayer, Qwen2
from fastvlm_convert.model.fastvlm import FastVLM
from fastvlm_convert.model.vision import AttentionBlock, RepMixerBlock, Stage

OnValue = Callable[[str, Tensor], None]


@contextmanager
def observed(model: FastVLM, on_value: OnValue) -> Iterator[None]:
    """Report what operations give while the model runs.

    BatchNorm and LayerScale are reported as part of the operation before them, as programs compute them, so a
    folded model and one that is not report the same.

    Args:
        model: The reference.
        on_value: Called with the name of an operation and what it gives; not to be changed.
    """
    hooks = Hooks()
    try:
        _watch_vision(hooks, model, on_value)
        _watch_decoder(hooks, model.decoder, on_value)
        yield
    finally:
        hooks.remove()


class Hooks:
    """Hooks on modules, to be removed together."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def remove(self) -> None:
        """Remove all."""
        for handle in self._handles:
            handle.remove()

    def output(self, module: nn.Module, then: Callable[[Tensor], None]) -> None:
        """Call a function with what a module gives."""
        self._handles.append(module.register_forward_hook(lambda _m, _i, y: then(y)))

    def first_input(self, module: nn.Module, then: Callable[[Tensor], None]) -> None:
        """Call a function with what a module is given first."""
        self._handles.append(module.register_forward_pre_hook(lambda _m, x: then(x[0])))

    def around(self, module: nn.Module, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        """Call functions before and after a module runs."""
        self._handles.append(module.register_forward_pre_hook(lambda _m, _i: enter()))
        self._handles.append(module.register_forward_hook(lambda _m, _i, _y: leave()))


def _watch_vision(hooks: Hooks, model: FastVLM, on_value: OnValue) -> None:
    def report(name: str, scale: Tensor | None = None) -> Callable[[Tensor], None]:
        return lambda y: on_value(name, y if scale is None else y * scale)

    for i, conv in enumerate(model.vision.stem):
        hooks.output(conv, report(f"stem_{i}"))
    for s, stage in enumerate(model.vision.stages):
        assert isinstance(stage, Stage)
        for i, conv in enumerate(stage.downsample or ()):
            hooks.output(conv, report(f"s{s}_down_{i}"))
        if stage.position is not None:
            hooks.output(stage.position, report(f"s{s}_position"))
        for b, block in enumerate(stage.blocks):
            assert isinstance(block, RepMixerBlock | AttentionBlock)
            if isinstance(block, RepMixerBlock):
                hooks.output(block.mixer, report(vision_op(s, b, "mixer")))
            else:
                hooks.first_input(block.ffn, report(vision_op(s, b, "attn_residual")))
                hooks.output(block.norm, report(vision_op(s, b, "norm")))
                hooks.output(block.attention.qkv, report(vision_op(s, b, "qkv")))
                hooks.output(block.attention.proj, report(vision_op(s, b, "proj"), block.attention_scale))
            hooks.output(block.ffn.bn, report(vision_op(s, b, "ffn_conv")))
            hooks.output(block.ffn.fc1, report(vision_op(s, b, "fc1")))
            scale = None if block.ffn_scale is None else block.ffn_scale.view(-1, 1, 1)
            hooks.output(block.ffn.fc2, report(vision_op(s, b, "fc2"), scale))
            hooks.output(block, report(vision_op(s, b, "residual")))
    hooks.output(model.vision.final.conv, report("final"))
    hooks.output(model.vision.final.se, report("se_scaled"))
    hooks.output(model.projector.fc1, report("projector_fc1"))
    hooks.output(model.projector.fc2, report("projector_fc2"))


def _watch_decoder(hooks: Hooks, decoder: Qwen2, on_value: OnValue) -> None:
    def report(name: str) -> Callable[[Tensor], None]:
        return lambda y: on_value(name, y)

    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        hooks.output(layer.input_layernorm, report(decoder_op(i, "attn_norm")))
        for part in "qkv":
            hooks.output(getattr(layer.self_attn, f"{part}_proj"), report(decoder_op(i, part)))
        hooks.output(layer.self_attn.o_proj, report(decoder_op(i, "o")))
        hooks.first_input(layer.post_attention_layernorm, report(decoder_op(i, "attn_residual")))
        hooks.output(layer.post_attention_layernorm, report(decoder_op(i, "mlp_norm")))
        hooks.output(layer.mlp.gate_proj, report(decoder_op(i, "gate")))
        hooks.output(layer.mlp.up_proj, report(decoder_op(i, "up")))
        hooks.first_input(layer.mlp.down_proj, report(decoder_op(i, "gated")))
        hooks.output(layer.mlp.down_proj, report(decoder_op(i, "down")))
        hooks.output(layer, report(decoder_op(i, "residual")))
    hooks.output(decoder.norm, report("final_norm"))
    hooks.output(decoder, report("logits"))
