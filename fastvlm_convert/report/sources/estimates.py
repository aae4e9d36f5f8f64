"""What `estimate` says of phones, by its own function."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PhoneEstimate:
    """What one phone may do with one target, at best.

    Attributes:
        phone: Its name.
        target: The target.
        tokens_per_s: Ceiling of decoding.
        first_token_s: Floor of the first token, or None where it is not known.
        memory_bytes: Memory at the full context.
        limit_bytes: What an app may take, or None where it is not known.
        source: Where the phone's figures are from.
    """

    phone: str
    target: str
    tokens_per_s: float
    first_token_s: float | None
    memory_bytes: int
    limit_bytes: int | None
    source: str

    @property
    def fits(self) -> bool | None:
        """Whether an app may take that much memory; None where the limit is not known."""
        return None if self.limit_bytes is None else self.memory_bytes <= self.limit_bytes


@dataclass(frozen=True)
class Estimates:
    """Estimates, and how they were made.

    Attributes:
        phones: One a phone and target.
        method: In a sentence or two.
    """

    phones: tuple[PhoneEstimate, ...]
    method: str
