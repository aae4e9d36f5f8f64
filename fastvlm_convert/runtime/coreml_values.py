"""What the operations of a bundle's Core ML packages give, where the interpreter runs them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from fastvlm_convert.errors import BundleError
from fastvlm_convert.io_names import Component
from fastvlm_convert.mil import OpResult
from fastvlm_convert.runtime.coreml_session import CoreMLSession, InterpretedPackage

OnValue = Callable[[str, np.ndarray], None]


def coreml_values(session: CoreMLSession, inputs: Mapping[Component, np.ndarray], on_value: OnValue) -> None:
    """Run the encoder and the decoder, and report what their operations give.

    Args:
        session: The packages.
        inputs: Of `vision` pixel values, float32 [1, 3, S, S]; of `decoder` embeddings of a prompt, float32
            [n, hidden]. What is not there is not run.
        on_value: Called with the name of an operation and its result. A prompt that is run in several calls
            comes in as many pieces, the last one perhaps padded.

    Raises:
        BundleError: Core ML itself runs the packages, which hands out no such values.
    """

    def report(result: OpResult) -> None:
        for name, value in result.outputs.items():
            on_value(name, value)

    with _reported(session, report):
        if "vision" in inputs:
            session.encode_image(inputs["vision"])
        if "decoder" in inputs:
            session.prefill(inputs["decoder"])


def encoder_integers(
    session: CoreMLSession, pixel_values: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What an encoder with integer activations rounds to, and its image tokens.

    Args:
        session: The packages.
        pixel_values: float32 [1, 3, S, S].

    Returns:
        Integers by the name of their value, uint8 where the signed ones of the program are 128 less; and
        float32 [num_image_tokens, hidden].

    Raises:
        BundleError: Core ML itself runs the packages, which hands out no such values.
    """
    integers: dict[str, np.ndarray] = {}

    def report(result: OpResult) -> None:
        if result.type == "quantize":
            integers.update({name: (q + 128).astype(np.uint8) for name, q in result.outputs.items()})

    with _reported(session, report):
        features = session.encode_image(pixel_values)
    return integers, features


@contextmanager
def _reported(session: CoreMLSession, report: Callable[[OpResult], None]) -> Iterator[None]:
    """While the block lasts, a function gets what each operation gives.

    Raises:
        BundleError: Core ML itself runs the packages.
    """
    packages = [package for package in session.packages if isinstance(package, InterpretedPackage)]
    if len(packages) != len(session.packages):
        raise BundleError("Core ML hands out no values between operations", hint="use --interpret")
    try:
        for package in packages:
            package.on_op = report
        yield
    finally:
        for package in packages:
            package.on_op = None
