"""Faults in the nodes of ONNX graphs."""

from typing import Any, Final

import numpy as np

from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.fault import NotApplicableError
from fastvlm_convert.verification.faults.onnx_store import open_graph
from fastvlm_convert.verification.faults.roundings import WIDER, middle_rounding

_ATTENTION: Final = "GroupQueryAttention"
_PAST: Final = (3, 4)  # inputs of it: keys and values
_LEVEL: Final = "accuracy_level"
_FASTEST: Final = 4


def change_accuracy_level(copy: Copy) -> None:
    """Let quantized products round their activations where they should not, or the other way round."""
    graph = open_graph(copy, "decoder")
    levels = [a for node in graph.model.graph.node for a in node.attribute if a.name == _LEVEL]
    if not levels:
        raise NotApplicableError("no product reads integers")
    for level in levels:
        level.i = 0 if level.i == _FASTEST else _FASTEST
    graph.save()


def widen_activations(copy: Copy) -> None:
    """Let a convolution in the middle of the encoder round what it gives in wider steps."""
    graph = open_graph(copy, "vision")
    nodes = {node.output[0]: node for node in graph.model.graph.node if node.op_type == "QuantizeLinear"}
    scale = nodes[middle_rounding(list(nodes))].input[1]
    (tensor,) = (t for t in graph.model.graph.initializer if t.name == scale)
    graph.write(tensor, graph.read(tensor) * np.float32(WIDER))


def overwrite_slot(copy: Copy) -> None:
    """Let one layer find the second token's key and value in the first slot of its cache, too."""
    from onnx import helper, numpy_helper

    graph = open_graph(copy, "decoder")
    nodes: Any = graph.model.graph.node
    layers = [node for node in nodes if node.op_type == _ATTENTION]
    if not layers:
        raise NotApplicableError("no operator has a cache")
    attention = layers[len(layers) // 2]
    numbers = {"axis": 2, "second": 1, "third": 2, "end": np.iinfo(np.int64).max}
    for name, value in numbers.items():
        tensor = numpy_helper.from_array(np.array([value], np.int64), _named(name))
        graph.model.graph.initializer.append(tensor)
    for index in _PAST:
        past = attention.input[index]
        parts = [_named(past, part) for part in ("first", "rest")]
        for part, end in zip(parts, ("third", "end"), strict=True):
            inputs = [past, *(_named(name) for name in ("second", end, "axis"))]
            nodes.insert(0, helper.make_node("Slice", inputs, [part], name=part))
        joined = helper.make_node("Concat", parts, [_named(past)], name=_named(past), axis=2)
        nodes.insert(2, joined)
        attention.input[index] = joined.output[0]
    graph.save()


def _named(*parts: str) -> str:
    return "_".join(("overwritten", *parts))
