"""How threads wait for work where two runtimes share a process."""

import os
from typing import Final

_POLICY: Final = "OMP_WAIT_POLICY"


def wait_passively() -> None:
    """Let PyTorch's threads sleep while they wait, unless the user says otherwise.

    They spin by default, on the cores that the bundle's runtime needs. Works until PyTorch loads, which reads
    the setting once.
    """
    os.environ.setdefault(_POLICY, "passive")
