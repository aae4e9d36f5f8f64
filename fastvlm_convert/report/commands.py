"""The commands that make what is missing on a page, as a user would type them."""

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Commands:
    """Commands about one bundle.

    Attributes:
        bundle: Name of its folder.
    """

    bundle: str

    @property
    def _name(self) -> str:
        # A name that begins with a dash would be taken for an option.
        return shlex.quote(f"./{self.bundle}" if self.bundle.startswith("-") else self.bundle)

    @property
    def verify(self) -> str:
        """Makes verification.json."""
        return f"fastvlm-convert verify {self._name} --reference CHECKPOINT --record"

    @property
    def bench(self) -> str:
        """Makes what `--bench` takes."""
        return f"fastvlm-convert bench {self._name} --reference CHECKPOINT --json > bench.json"

    @property
    def evaluate(self) -> str:
        """Makes what `--evaluation` takes."""
        return f"fastvlm-convert evaluate CHECKPOINT {self._name} --dataset demo --json > evaluation.json"

    @property
    def estimate(self) -> str:
        """Shows what phones may do."""
        return f"fastvlm-convert estimate {self._name}"

    @property
    def lint(self) -> str:
        """Shows what is known to go wrong."""
        return f"fastvlm-convert lint {self._name}"
