"""What the operations of a bundle's Core ML packages give, where the interpreter runs them."""

from collections.abc import Callable, Mapping

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
    packages = [package for package in session.packages if isinstance(package, InterpretedPackage)]
    if len(packages) != len(session.packages):
        raise BundleError("Core ML hands out no values between operations", hint="use --interpret")

    def report(result: OpResult) -> None:
        for name, value in result.outputs.items():
            on_value(name, value)

    try:
        for package in packages:
            package.on_op = report
        if "vision" in inputs:
            session.encode_image(inputs["vision"])
        if "decoder" in inputs:
            session.prefill(inputs["decoder"])
    finally:
        for package in packages:
            package.on_op = None
