"""The reference as a session."""

import numpy as np
import torch

from fastvlm_convert.model.fastvlm import FastVLM


class TorchSession:
    """Runs the torch reference in float32; implements `session.Session`."""

    trouble: str | None = None  # not watched

    def __init__(self, model: FastVLM, context_length: int) -> None:
        self.executed_by = f"torch {torch.__version__.partition('+')[0]}"
        self.context_length = context_length
        self.num_image_tokens = model.config.vision.num_image_tokens
        self.model = model
        self._cache = model.decoder.new_cache(0)

    @torch.inference_mode()
    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> float32 [num_image_tokens, hidden]."""
        return self.model.encode_image(torch.from_numpy(pixel_values))[0].numpy()

    def prepare(self, pictures: np.ndarray) -> np.ndarray:
        """The same: pictures come prepared."""
        return pictures

    @torch.inference_mode()
    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        return self.model.decoder.embed_tokens(torch.from_numpy(token_ids)).numpy()

    @torch.inference_mode()
    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Start a new sequence; logits of the last position, float32 [vocab]."""
        self._cache = self.model.decoder.new_cache(self.context_length)
        return self._append(inputs_embeds)

    @torch.inference_mode()
    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append one token; its logits, float32 [vocab]."""
        return self._append(inputs_embeds)

    @torch.inference_mode()
    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Append tokens from a position on; keys and values that are skipped stay zero."""
        for layer in self._cache:
            layer.length = position
        return self._append(inputs_embeds)

    def _append(self, inputs_embeds: np.ndarray) -> np.ndarray:
        logits = self.model.decoder(torch.from_numpy(inputs_embeds)[None], self._cache)
        return logits[0, -1].numpy()
