"""What a package says of its functions: names, types and shapes of inputs, outputs and states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.package import Package
from fastvlm_convert.mil.proto import feature_types
from fastvlm_convert.mil.types import (
    MAX_AXES,
    ElementType,
    Message,
    TensorType,
    dictionary_types,
    shape_text,
    tensor_type,
)

ColorLayout = Literal["RGB", "BGR", "grayscale", "grayscale float16"]

DEFAULT_FUNCTION: Final = "main"
# Far above any program: a file of millions of tiny operations would take hours.
MAX_OPERATIONS: Final = 1 << 18
MAX_FUNCTIONS: Final = 1 << 10

_COLOR_SPACES: Final[Mapping[int, ColorLayout]] = {
    feature_types.ImageFeatureType.GRAYSCALE: "grayscale",
    feature_types.ImageFeatureType.GRAYSCALE_FLOAT16: "grayscale float16",
    feature_types.ImageFeatureType.RGB: "RGB",
    feature_types.ImageFeatureType.BGR: "BGR",
}


@dataclass(frozen=True)
class Flexibility:
    """The shapes an input may have, where there is more than one.

    Attributes:
        shapes: The enumerated shapes, or none if there are ranges.
        ranges: Lowest and highest size of every axis, or none if shapes are enumerated; None is no limit.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()

    def allows(self, shape: Sequence[int]) -> bool:
        """Whether an input may have this shape."""
        if self.shapes:
            return tuple(shape) in self.shapes
        return len(shape) == len(self.ranges) and all(
            low <= n and (high is None or n <= high)
            for n, (low, high) in zip(shape, self.ranges, strict=True)
        )

    def __str__(self) -> str:
        """For messages."""
        if self.shapes:
            return " or ".join(shape_text(s) for s in self.shapes)
        spans = (
            str(low) if low == high else f"{low}..{'' if high is None else high}" for low, high in self.ranges
        )
        return f"[{', '.join(spans)}]"


@dataclass(frozen=True)
class ValueSpec:
    """An input, output or state of a function.

    Attributes:
        name: What it is called.
        type: Its element type and shape in the program; of a dictionary, that of its values.
        description: What the author says of it.
        flexibility: The shapes it may have, or None if there is only that of its type.
        color: Order of the channels if it is an image, else None.
        default_shape: The shape that its description gives, or None.
        default: The number that fills an optional input that is not given; None if it is required.
        keys: Type of its keys if it is a dictionary, a classifier's probabilities by label; else None.
    """

    name: str
    type: TensorType
    description: str = ""
    flexibility: Flexibility | None = None
    color: ColorLayout | None = None
    default_shape: tuple[int, ...] | None = None
    default: float | None = None
    keys: ElementType | None = None

    @property
    def dtype(self) -> str:
        """Name of its element type: `float16`, `int32`."""
        return self.type.element.name

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Its dimensions; None for a flexible one."""
        return self.type.shape

    @property
    def example_shape(self) -> tuple[int, ...]:
        """A shape it may have: the default, or the smallest."""
        candidates: list[tuple[int, ...]] = [] if self.default_shape is None else [self.default_shape]
        if self.flexibility is not None:
            candidates += [*self.flexibility.shapes, tuple(low for low, _ in self.flexibility.ranges)]
        smallest = tuple(1 if n is None else n for n in self.shape)
        return next((shape for shape in candidates if self.allows(shape)), smallest)

    def allows(self, shape: Sequence[int]) -> bool:
        """Whether it may have this shape."""
        fits = len(shape) == len(self.shape) and all(
            n >= 0 and want in (None, n) for n, want in zip(shape, self.shape, strict=True)
        )
        return fits and (self.flexibility is None or self.flexibility.allows(shape))

    def __str__(self) -> str:
        """For messages: `float16 [1, 1..64, 896]`."""
        if self.keys is not None:
            return f"dictionary, {self.keys.name} to {self.dtype}"
        shape = shape_text(self.shape) if self.flexibility is None else str(self.flexibility)
        image = f"{self.color} image, " if self.color else ""
        optional = "" if self.default is None else f", {self.default:g} by default"
        return f"{image}{self.dtype}{f' {shape}' if self.type.element.bits else ''}{optional}"


@dataclass(frozen=True)
class FunctionSpec:
    """What a function takes and gives.

    Attributes:
        name: What it is called.
        inputs: In the program's order.
        outputs: In the program's order.
        states: Tensors that persist between calls.
    """

    name: str
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    states: tuple[ValueSpec, ...]

    def __str__(self) -> str:
        """For people: `main(x: float32 [1, 3]) -> y: float32 [1, 3]`."""
        taken, made, kept = (
            ", ".join(f"{v.name}: {v}" for v in values) for values in (self.inputs, self.outputs, self.states)
        )
        return f"{self.name}({taken}) -> {made}" + (f"; states {kept}" if kept else "")


def default_function(package: Package) -> str:
    """The function that is meant when none is named; the only one, if there is one only.

    Raises:
        BundleError: The program has no such function.
    """
    functions = package.spec.mlProgram.functions
    named: str = package.spec.description.defaultFunctionName
    name = named or (next(iter(functions)) if len(functions) == 1 else DEFAULT_FUNCTION)
    if name not in functions:
        have = ", ".join(sorted(functions)) or "none"
        raise BundleError(
            f"the program has no function '{name[:80]}'; it has {have[:200]}", where=package.path
        )
    return name


def function_block(package: Package, name: str) -> Message:
    """The operations of a function: the block of its opset.

    Raises:
        BundleError: The function has no such block.
    """
    function = package.spec.mlProgram.functions[name]
    if function.opset not in function.block_specializations:
        have = ", ".join(sorted(function.block_specializations)) or "none"
        raise BundleError(
            f"function '{name[:80]}' asks for opset '{function.opset[:40]}', but has {have[:80]}",
            where=package.path,
        )
    block = function.block_specializations[function.opset]
    check_count(len(block.operations), MAX_OPERATIONS, f"function '{name[:80]}' has {{}} operations", package)
    return block


def check_count(count: int, most: int, what: str, package: Package) -> None:
    """Refuse more of something than any program has.

    Raises:
        BundleError: There are more.
    """
    if count > most:
        raise BundleError(f"{what.format(count)}, more than {most}", where=package.path)


def describe_functions(package: Package) -> dict[str, FunctionSpec]:
    """All functions of a package by name, in alphabetical order.

    Raises:
        BundleError: The program has none, or one has an input, output or state of an impossible type.
    """
    functions = package.spec.mlProgram.functions
    if not functions:
        raise BundleError("the program has no functions", where=package.path)
    check_count(len(functions), MAX_FUNCTIONS, "the program has {} functions", package)
    return {name: _describe(package, name) for name in sorted(functions)}


def describe_pipeline(package: Package, stages: Sequence[FunctionSpec]) -> FunctionSpec:
    """What a pipeline takes and gives, in the terms of its stages.

    Raises:
        BundleError: No stage has one of its inputs or outputs, or a stage has states.
    """
    for i, stage in enumerate(stages):
        if stage.states:
            raise BundleError(
                f"stage {i} of the pipeline has states, which cannot be run", where=package.path
            )
    taken: dict[str, ValueSpec] = {}
    made: dict[str, ValueSpec] = {}
    for stage in stages:
        taken = {**{v.name: v for v in stage.inputs}, **taken}
        made |= {v.name: v for v in stage.outputs}
    described = package.spec.description
    for kind, features, known in (("input", described.input, taken), ("output", described.output, made)):
        unknown = next((f.name for f in features if f.name not in known), None)
        if unknown is not None:
            raise BundleError(f"no stage of the pipeline has its {kind} '{unknown[:80]}'", where=package.path)
    return FunctionSpec(
        DEFAULT_FUNCTION,
        tuple(taken[f.name] for f in described.input),
        tuple(made[f.name] for f in described.output),
        (),
    )


def metadata(package: Package) -> dict[str, str]:
    """What the author wrote into the package, without what is empty."""
    found = package.spec.description.metadata
    known = {
        "description": found.shortDescription,
        "author": found.author,
        "license": found.license,
        "version": found.versionString,
    }
    return {k: v for k, v in {**known, **dict(sorted(found.userDefined.items()))}.items() if v}


def _describe(package: Package, name: str) -> FunctionSpec:
    described = package.spec.description
    if described.functions:
        described = next((f for f in described.functions if f.name == name), None)
    features = {
        kind: {f.name: f for f in getattr(described, kind)} if described is not None else {}
        for kind in ("input", "output", "state")
    }
    inputs: list[ValueSpec] = []
    states: list[ValueSpec] = []
    for value in package.spec.mlProgram.functions[name].inputs:
        is_state = value.type.WhichOneof("type") == "stateType"
        what = f"{'state' if is_state else 'input'} '{value.name[:80]}' of function '{name[:80]}'"
        declared = tensor_type(value.type, what)
        if declared is None or not declared.element.bits:
            raise BundleError(f"{what} is not a tensor of numbers", where=package.path)
        feature = features["state" if is_state else "input"].get(value.name)
        (states if is_state else inputs).append(_spec(value.name, declared, feature))
    outputs = _outputs(package, name, features["output"])
    return FunctionSpec(name, tuple(inputs), outputs, tuple(states))


def _outputs(package: Package, name: str, features: Mapping[str, Message]) -> tuple[ValueSpec, ...]:
    block = function_block(package, name)
    types = {o.name: o.type for operation in block.operations for o in operation.outputs}
    types |= {v.name: v.type for v in package.spec.mlProgram.functions[name].inputs}
    found = []
    for output in block.outputs:
        what = f"output '{output[:80]}' of function '{name[:80]}'"
        if output not in types:
            raise BundleError(f"{what} is made by no operation", where=package.path)
        declared = tensor_type(types[output], what)
        if declared is not None:
            found.append(_spec(output, declared, features.get(output)))
            continue
        dictionary = dictionary_types(types[output], what)
        if dictionary is None:
            raise BundleError(f"{what} is neither a tensor nor a dictionary", where=package.path)
        text = features[output].shortDescription if output in features else ""
        found.append(ValueSpec(output, dictionary[1], text, keys=dictionary[0]))
    return tuple(found)


def _spec(name: str, declared: TensorType, feature: Message) -> ValueSpec:
    if feature is None:
        return ValueSpec(name, declared)
    kind = feature.type.WhichOneof("Type")
    if kind == "imageType" and len(declared.shape) >= 3:
        image = feature.type.imageType
        size = (image.height, image.width)
        return ValueSpec(
            name,
            declared,
            feature.shortDescription,
            _image_flexibility(image, declared),
            _COLOR_SPACES.get(image.colorSpace),
            _with_size(declared, size),
        )
    if kind == "multiArrayType":
        array = feature.type.multiArrayType
        return ValueSpec(
            name,
            declared,
            feature.shortDescription,
            _flexibility(array),
            default_shape=tuple(array.shape[:MAX_AXES]) or None,
            default=_default(array) if feature.type.isOptional else None,
        )
    return ValueSpec(name, declared, feature.shortDescription)


def _default(array: Message) -> float | None:
    kind = array.WhichOneof("defaultOptionalValue")
    return None if kind is None else float(getattr(array, kind))


def _flexibility(array: Message) -> Flexibility | None:
    kind = array.WhichOneof("ShapeFlexibility")
    if kind == "enumeratedShapes" and array.enumeratedShapes.shapes:
        return Flexibility(shapes=tuple(tuple(s.shape) for s in array.enumeratedShapes.shapes))
    if kind == "shapeRange" and array.shapeRange.sizeRanges:
        return Flexibility(ranges=tuple(_range(r) for r in array.shapeRange.sizeRanges))
    return None


def _image_flexibility(image: Message, declared: TensorType) -> Flexibility | None:
    kind = image.WhichOneof("SizeFlexibility")
    leading = tuple(1 if n is None else n for n in declared.shape[:-2])
    if kind == "enumeratedSizes" and image.enumeratedSizes.sizes:
        return Flexibility(shapes=tuple((*leading, s.height, s.width) for s in image.enumeratedSizes.sizes))
    if kind == "imageSizeRange":
        sizes = image.imageSizeRange
        fixed = tuple((n, n) for n in leading)
        return Flexibility(ranges=(*fixed, _range(sizes.heightRange), _range(sizes.widthRange)))
    return None


def _with_size(declared: TensorType, size: tuple[int, int]) -> tuple[int, ...]:
    return (*(1 if n is None else n for n in declared.shape[:-2]), *size)


def _range(sizes: Message) -> tuple[int, int | None]:
    return sizes.lowerBound, None if sizes.upperBound < 0 else sizes.upperBound
