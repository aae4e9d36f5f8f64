"""What a Core ML package says to the apps that load it."""

from pathlib import Path

from fastvlm_convert.mil.description import describe_functions, metadata
from fastvlm_convert.mil.package import open_package


def described(package: Path) -> dict[str, str]:
    """The metadata of a package, and the layout and size of each picture that it takes, by name.

    Raises:
        BundleError: The package is damaged.
    """
    opened = open_package(package)
    pictures = {
        value.name: f"{value.color} image, {' x '.join(str(n) for n in value.example_shape[-2:])}"
        for function in describe_functions(opened).values()
        for value in function.inputs
        if value.color is not None
    }
    return {**metadata(opened), **pictures}
