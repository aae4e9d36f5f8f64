"""Faults in the operations of Core ML programs, and in what packages say of their inputs.

What reads packages needs coremltools, so it loads when a fault is planted.
"""

from typing import Any, Final

import numpy as np

from fastvlm_convert.io_names import DECODE, POSITION
from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.fault import NotApplicableError
from fastvlm_convert.verification.faults.roundings import WIDER, middle_rounding

_ONE: Final = "overwritten_slot_end"


def swap_picture_channels(copy: Copy) -> None:
    """Let the package say that its picture is blue, green, red."""
    from fastvlm_convert.mil.proto import feature_types
    from fastvlm_convert.verification.faults.coreml_store import open_program

    program = open_program(copy, "vision")
    kind = program.package.spec.description.input[0].type
    if kind.WhichOneof("Type") != "imageType":
        raise NotApplicableError("the package takes no picture but an array")
    kind.imageType.colorSpace = feature_types.ImageFeatureType.ColorSpace.Value("BGR")
    program.save()


def change_prompt(copy: Copy) -> None:
    """Let the package's metadata say that the question alone is the prompt."""
    from fastvlm_convert.verification.faults.coreml_store import open_program

    program = open_program(copy, "decoder")
    said = program.package.spec.description.metadata.userDefined
    if "prompt" not in said:
        raise NotApplicableError("the package says nothing of its prompt")
    said["prompt"] = "{question}"
    program.save()


def widen_activations(copy: Copy) -> None:
    """Let a convolution in the middle of the encoder round what it gives in wider steps."""
    from fastvlm_convert.verification.faults.coreml_store import open_program

    program = open_program(copy, "vision")
    for block in program.blocks():
        makers = {o.outputs[0].name: o for o in block.operations if o.outputs}
        rounding = makers[middle_rounding([name for name, o in makers.items() if o.type == "quantize"])]
        readers = [o for o in block.operations if _reads(o, "input", rounding.outputs[0].name)]
        for operation in (rounding, *readers):
            _widen(makers[operation.inputs["scale"].arguments[0].name])
    program.save()


def _reads(operation: Any, parameter: str, name: str) -> bool:  # noqa: ANN401  a protobuf message
    given = operation.inputs[parameter].arguments if parameter in operation.inputs else ()
    return any(argument.name == name for argument in given)


def _widen(constant: Any) -> None:  # noqa: ANN401
    """Make a number larger that the program holds as float32 or, in bytes, as float16."""
    tensor = constant.attributes["val"].immediateValue.tensor
    if tensor.WhichOneof("value") == "floats":
        tensor.floats.values[0] *= WIDER
    else:
        tensor.bytes.values = (np.frombuffer(tensor.bytes.values, np.float16) * np.float16(WIDER)).tobytes()


def overwrite_slot(copy: Copy) -> None:
    """Let one layer write the key and value of every decoded token into the first slot of its cache."""
    from fastvlm_convert.verification.faults.coreml_store import open_program

    program = open_program(copy, "decoder")
    (block,) = program.blocks([DECODE])
    operations = {o.outputs[0].name: o for o in block.operations if o.outputs}
    begins = [name for name in operations if name.endswith("_cache_begin") and name.startswith("l")]
    if not begins:
        raise NotApplicableError("no operation writes into a cache")
    begin = operations[begins[len(begins) // 2]]
    end = operations[begin.outputs[0].name.replace("_begin", "_end")]
    start = next(a.name for a in begin.inputs["values"].arguments if a.name != POSITION)
    zero = next(a.name for a in reversed(begin.inputs["values"].arguments) if a.name != POSITION)
    assert start != zero, "[layer, head], position, [0]"
    _replace(begin, POSITION, zero)
    _replace(end, "end", "num_tokens" if "num_tokens" in operations else _add_one(block, operations[zero]))
    program.save()


def _replace(operation: Any, old: str, new: str) -> None:  # noqa: ANN401  a protobuf message
    (argument,) = (a for a in operation.inputs["values"].arguments if a.name == old)
    argument.name = new


def _add_one(block: Any, zero: Any) -> str:  # noqa: ANN401
    """A constant [1] at the beginning of a block, like one that is [0]; its name."""
    block.operations.insert(0, zero)
    added = block.operations[0]
    added.outputs[0].name = _ONE
    added.attributes["name"].immediateValue.tensor.strings.values[0] = _ONE
    added.attributes["val"].immediateValue.tensor.ints.values[0] = 1
    return _ONE
