"""What a package says of its functions: names, types and shapes of inputs, outputs and states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.package import Package
from fastvlm_convert.mil.proto import feature_types
from fastvlm_convert.mil.types import Message, TensorType, shape_text, tensor_type

ColorLayout = Literal["RGB", "BGR", "grayscale"]

DEFAULT_FUNCTION: Final = "main"

_COLOR_SPACES: Final[Mapping[int, ColorLayout]] = {
    feature_types.ImageFeatureType.GRAYSCALE: "grayscale",
    feature_types.ImageFeatureType.GRAYSCALE_FLOAT16: "grayscale",
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
        type: Its element type and shape in the program.
        description: What the author says of it.
        flexibility: The shapes it may have, or None if there is only that of its type.
        color: Order of the channels if it takes an image, else None.
        default_shape: The shape that its description gives, or None.
    """

    name: str
    type: TensorType
    description: str = ""
    flexibility: Flexibility | None = None
    color: ColorLayout | None = None
    default_shape: tuple[int, ...] | None = None

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
        if self.type.fixed_shape is not None:
            return self.type.fixed_shape
        if self.default_shape is not None and len(self.default_shape) == len(self.shape):
            return self.default_shape
        return tuple(1 if n is None else n for n in self.shape)

    def allows(self, shape: Sequence[int]) -> bool:
        """Whether it may have this shape."""
        fits = len(shape) == len(self.shape) and all(
            want is None or n == want for n, want in zip(shape, self.shape, strict=True)
        )
        return fits and (self.flexibility is None or self.flexibility.allows(shape))

    def __str__(self) -> str:
        """For messages: `float16 [1, 1..64, 896]`."""
        shape = shape_text(self.shape) if self.flexibility is None else str(self.flexibility)
        return f"{self.color + ' image, ' if self.color else ''}{self.dtype} {shape}"


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
    return function.block_specializations[function.opset]


def describe_functions(package: Package) -> dict[str, FunctionSpec]:
    """All functions of a package by name, in alphabetical order.

    Raises:
        BundleError: The program has none, or one has an input, output or state of an impossible type.
    """
    functions = package.spec.mlProgram.functions
    if not functions:
        raise BundleError("the program has no functions", where=package.path)
    return {name: _describe(package, name) for name in sorted(functions)}


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
        named = [f for f in described.functions if f.name == name]
        described = named[0] if named else None
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
        if declared is None:
            raise BundleError(f"{what} is no tensor", where=package.path)
        feature = features["state" if is_state else "input"].get(value.name)
        (states if is_state else inputs).append(_spec(value.name, declared, feature))
    block = function_block(package, name)
    types = {o.name: o.type for operation in block.operations for o in operation.outputs}
    types |= {v.name: v.type for v in package.spec.mlProgram.functions[name].inputs}
    outputs = []
    for output in block.outputs:
        what = f"output '{output[:80]}' of function '{name[:80]}'"
        declared = tensor_type(types[output], what) if output in types else None
        if declared is None:
            raise BundleError(f"{what} is made by no operation, or no tensor", where=package.path)
        outputs.append(_spec(output, declared, features["output"].get(output)))
    return FunctionSpec(name, tuple(inputs), tuple(outputs), tuple(states))


def _spec(name: str, declared: TensorType, feature: Message) -> ValueSpec:
    if feature is None:
        return ValueSpec(name, declared)
    kind = feature.type.WhichOneof("Type")
    if kind == "imageType":
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
            name, declared, feature.shortDescription, _flexibility(array), None, tuple(array.shape) or None
        )
    return ValueSpec(name, declared, feature.shortDescription)


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
