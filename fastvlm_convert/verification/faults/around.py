"""An app with a fault: a session that does one thing wrong around one that does all things right."""

from dataclasses import replace

import numpy as np

from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.session import Session


class Around:
    """A session that hands everything on; implements `session.Session`.

    Args:
        session: Does the work.
    """

    def __init__(self, session: Session) -> None:
        self.inner = session
        self.executed_by = session.executed_by
        self.context_length = session.context_length
        self.num_image_tokens = session.num_image_tokens

    @property
    def trouble(self) -> str | None:
        """The operation that first gave NaN or infinity, in words, or None."""
        return self.inner.trouble

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> float32 [num_image_tokens, hidden]."""
        return self.inner.encode_image(pixel_values)

    def prepare(self, pictures: np.ndarray) -> np.ndarray:
        """What the encoder gets of what `encode_image` is given, float32 [1, 3, S, S]."""
        return self.inner.prepare(pictures)

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        return self.inner.embed(token_ids)

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Start a new sequence; logits of the last position, float32 [vocab]."""
        return self.inner.prefill(inputs_embeds)

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append one token; its logits, float32 [vocab]."""
        return self.inner.decode(inputs_embeds)

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Append tokens from a position on; logits of the last, float32 [vocab]."""
        return self.inner.extend(inputs_embeds, position)


def around(model: LoadedModel, session: Session) -> LoadedModel:
    """A model with another session."""
    return replace(model, session=session)
