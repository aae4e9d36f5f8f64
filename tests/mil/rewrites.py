"""Ways to rewrite the program of a package: still a sound file, but of a program that makes no sense."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_convert.mil.ops.table import CONSTEXPRS, OPS
from fastvlm_convert.mil.plan import CONTROL
from fastvlm_convert.mil.proto import feature_types, mil, model
from tests.mil.mutations import MODEL, Seed, damage

KINDS = sorted(OPS.keys() | CONSTEXPRS.keys() | CONTROL)
DTYPES = sorted(mil.DataType.values())
SIZES = [0, 1, 2, 3, 4, 7, 64, 4096]
ABSURD = [1 << 20, 1 << 28, 1 << 31, 1 << 40, (1 << 64) - 1]
NUMBERS = [0, 1, -1, 2, 3, -7, 100, 65536, 2**31 - 1, -(2**31), 0.5, -1.5, 1e30, np.inf, -np.inf, np.nan]
TEXTS = [
    "",
    "same",
    "valid",
    "custom",
    "fp16",
    "int32",
    "bool",
    "LINEAR",
    "reflect",
    "tanh",
    "\x1b[31m",
    "é" * 99,
]

Random = np.random.Generator


def rewrite(seed: Seed, number: int, absurd: bool = False) -> dict[Path, bytes | None]:
    """The rewriting of a number: what becomes of which file.

    Args:
        seed: A sound package.
        number: Which rewriting.
        absurd: Whether sizes may also be far too large.
    """
    rng = np.random.default_rng([number, 7, *seed.name.encode()])
    spec = model.Model.FromString(seed.files[MODEL])
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        if _blocks(spec):
            _pick(rng, EDITS)(spec, rng, absurd)
    return {MODEL: spec.SerializeToString()}


def _pick(rng: Random, items: Any) -> Any:
    found = list(items)
    return found[int(rng.integers(0, len(found)))]


def _programs(spec: Any) -> list[Any]:
    if spec.WhichOneof("Type") == "mlProgram":
        return [spec.mlProgram]
    kind = spec.WhichOneof("Type")
    if kind is None:
        return []
    stages = (spec.pipeline if kind == "pipeline" else getattr(spec, kind).pipeline).models
    return [program for stage in stages for program in _programs(stage)]


def _blocks(spec: Any) -> list[Any]:
    def inside(block: Any) -> Iterator[Any]:
        yield block
        for operation in block.operations:
            for inner in operation.blocks:
                yield from inside(inner)

    return [
        b
        for program in _programs(spec)
        for function in program.functions.values()
        for top in function.block_specializations.values()
        for b in inside(top)
    ]


def _operations(spec: Any, *, constants: bool) -> list[Any]:
    found = [o for b in _blocks(spec) for o in b.operations]
    return [o for o in found if (o.type == "const") is constants] or found


def _names(spec: Any) -> list[str]:
    named = [o.name for b in _blocks(spec) for operation in b.operations for o in operation.outputs]
    functions = [f for program in _programs(spec) for f in program.functions.values()]
    return named + [v.name for f in functions for v in f.inputs] + ["nobody"]


def _tensor_types(spec: Any) -> list[Any]:
    """Every tensor type that the program declares, inside of states and lists too."""
    named = [o.type for b in _blocks(spec) for operation in b.operations for o in operation.outputs]
    named += [v.type for p in _programs(spec) for f in p.functions.values() for v in f.inputs]
    found = []
    for value in named:
        kind = value.WhichOneof("type")
        inner = {"stateType": value.stateType.wrappedType, "listType": value.listType.type}.get(kind, value)
        found.append(inner.tensorType)
    return found


def _retype(spec: Any, rng: Random, absurd: bool) -> None:
    del absurd
    _pick(rng, _tensor_types(spec)).dataType = _pick(rng, DTYPES)


def _reshape(spec: Any, rng: Random, absurd: bool) -> None:
    declared = _pick(rng, _tensor_types(spec))
    how = rng.random()
    if how < 0.15 or not declared.dimensions:
        declared.dimensions.add().constant.size = _pick(rng, SIZES)
    elif how < 0.25:
        del declared.dimensions[0]
    elif how < 0.35:
        _pick(rng, declared.dimensions).unknown.SetInParent()
    else:
        _pick(rng, declared.dimensions).constant.size = _pick(rng, SIZES + ABSURD * absurd)


def _rewire(spec: Any, rng: Random, absurd: bool) -> None:
    del absurd
    operation = _pick(rng, _operations(spec, constants=False))
    bindings = [a for i in operation.inputs.values() for a in i.arguments]
    if bindings:
        _pick(rng, bindings).name = _pick(rng, _names(spec))


def _rename_kind(spec: Any, rng: Random, absurd: bool) -> None:
    del absurd
    _pick(rng, _operations(spec, constants=False)).type = _pick(rng, KINDS)


def _other_inputs(spec: Any, rng: Random, absurd: bool) -> None:
    del absurd
    operation = _pick(rng, _operations(spec, constants=False))
    keys = sorted(operation.inputs)
    if keys and rng.random() < 0.4:
        del operation.inputs[_pick(rng, keys)]
        return
    known = sorted(OPS[operation.type].inputs) if operation.type in OPS else keys
    argument = operation.inputs[_pick(rng, known or ["x"])]
    if rng.random() < 0.5 and argument.arguments:
        argument.arguments.add().CopyFrom(argument.arguments[0])
    else:
        argument.arguments.add().name = _pick(rng, _names(spec))


def _other_numbers(spec: Any, rng: Random, absurd: bool) -> None:
    del absurd
    constants = [o for o in _operations(spec, constants=True) if "val" in o.attributes]
    if not constants:
        return
    tensor = _pick(rng, constants).attributes["val"].immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if kind is None:
        return
    values = getattr(tensor, kind).values
    made = {
        "floats": lambda: float(np.float32(_pick(rng, NUMBERS))),
        "doubles": lambda: float(_pick(rng, NUMBERS)),
        "ints": lambda: int(np.clip(np.nan_to_num(_pick(rng, NUMBERS)), -(2**31), 2**31 - 1)),
        "longInts": lambda: int(np.nan_to_num(_pick(rng, NUMBERS[:13]))),
        "bools": lambda: bool(rng.random() < 0.5),
        "strings": lambda: _pick(rng, TEXTS),
    }
    if kind in made and len(values) and rng.random() < 0.8:
        values[int(rng.integers(0, len(values)))] = made[kind]()
    elif kind in made:
        values.append(made[kind]())


def _move_operations(spec: Any, rng: Random, absurd: bool) -> None:
    del absurd
    block = _pick(rng, [b for b in _blocks(spec) if b.operations])
    at, other = (int(rng.integers(0, len(block.operations))) for _ in range(2))
    how = rng.random()
    if how < 0.3:
        del block.operations[at]
    elif how < 0.6:
        block.operations.add().CopyFrom(block.operations[at])
    else:
        kept = mil.Operation()
        kept.CopyFrom(block.operations[at])
        block.operations[at].CopyFrom(block.operations[other])
        block.operations[other].CopyFrom(kept)


def _other_outputs(spec: Any, rng: Random, absurd: bool) -> None:
    del absurd
    block = _pick(rng, _blocks(spec))
    if block.outputs and rng.random() < 0.7:
        block.outputs[int(rng.integers(0, len(block.outputs)))] = _pick(rng, _names(spec))
    else:
        block.outputs.append(_pick(rng, _names(spec)))


def _other_description(spec: Any, rng: Random, absurd: bool) -> None:
    features = [*spec.description.input, *spec.description.output]
    for stage in spec.pipeline.models if spec.WhichOneof("Type") == "pipeline" else []:
        features += [*stage.description.input, *stage.description.output]
    feature = _pick(rng, features)
    sizes = SIZES + [-1, -(1 << 40), *ABSURD[:4]] * absurd
    how = rng.random()
    if how < 0.2:
        feature.name = _pick(rng, _names(spec))
    elif how < 0.4:
        feature.type.imageType.width, feature.type.imageType.height = (_pick(rng, sizes) for _ in range(2))
        feature.type.imageType.colorSpace = _pick(rng, feature_types.ImageFeatureType.ColorSpace.values())
    elif how < 0.6:
        feature.type.multiArrayType.shape.append(_pick(rng, sizes))
    elif how < 0.8:
        ranges = feature.type.multiArrayType.shapeRange.sizeRanges
        for _ in range(int(rng.integers(1, 4))):
            ranges.add(lowerBound=abs(_pick(rng, SIZES)), upperBound=_pick(rng, [*sizes, -1]))
    else:
        feature.type.isOptional = True
        feature.type.multiArrayType.floatDefaultValue = float(np.float32(_pick(rng, NUMBERS)))


def _other_stages(spec: Any, rng: Random, absurd: bool) -> None:
    """Pipelines: a stage twice, none, or one inside of another. Others: made a pipeline of themselves."""
    del absurd
    if spec.WhichOneof("Type") == "pipeline":
        stages = spec.pipeline.models
        how = rng.random()
        if how < 0.4:
            stages.add().CopyFrom(_pick(rng, stages))
        elif how < 0.7:
            del stages[int(rng.integers(0, len(stages)))]
        if stages:
            return
    inner = model.Model()
    inner.CopyFrom(spec)
    spec.pipeline.models.add().CopyFrom(inner)


def _other_blob(spec: Any, rng: Random, absurd: bool) -> None:
    stored = [
        o.attributes["val"].blobFileValue
        for o in _operations(spec, constants=True)
        if "val" in o.attributes and o.attributes["val"].HasField("blobFileValue")
    ]
    if stored:
        _pick(rng, stored).offset = _pick(rng, [s.offset for s in stored] + SIZES + ABSURD * absurd)


EDITS: list[Callable[[Any, Random, bool], None]] = [
    _retype, _reshape, _reshape, _rewire, _rewire, _rename_kind, _other_inputs, _other_numbers,
    _other_numbers, _move_operations, _other_outputs, _other_description, _other_stages, _other_blob,
]  # fmt: skip

# How the long fuzz changes a package: bytes of its files, or its program.
WAYS: dict[str, Callable[[Seed, int], dict[Path, bytes | None]]] = {
    "bytes": damage,
    "program": lambda seed, number: rewrite(seed, number, absurd=True),
}
