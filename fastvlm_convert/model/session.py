"""The reference as a session."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils import convert_conv2d_weight_memory_format

from fastvlm_convert.heap import freed_blocks_kept
from fastvlm_convert.model.batch import ReadPrompt, answers_with_logits, forced_logits, read_prompt
from fastvlm_convert.model.fastvlm import FastVLM
from fastvlm_convert.progress import OnShare


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

    @torch.inference_mode()
    def teacher_forced(self, inputs_embeds: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Start a new sequence; logits after the embeddings and after each token, float32 [m + 1, vocab]."""
        self._cache = self.model.decoder.new_cache(self.context_length)
        given = np.concatenate([inputs_embeds, self.embed(token_ids)])
        decoder = self.model.decoder
        hidden = decoder.hidden(torch.from_numpy(given)[None], self._cache)[0, -len(token_ids) - 1 :]
        return decoder.logits(hidden).numpy()

    def greedy_answers(
        self,
        prompts: Sequence[np.ndarray],
        limits: Sequence[int],
        eos_token_ids: Sequence[int],
        on_progress: OnShare,
        hints: Sequence[Sequence[int]] | None = None,
    ) -> list[tuple[list[int], np.ndarray]]:
        """Answer prompts side by side; see `batch.answers_with_logits`."""
        embeds, decoder = [torch.from_numpy(prompt) for prompt in prompts], self.model.decoder
        found = answers_with_logits(
            decoder, embeds, limits, eos_token_ids, on_progress, hints=hints, read=self._read_once
        )
        return [(ids, logits.numpy()) for ids, logits in found]

    def read(self, inputs_embeds: np.ndarray) -> ReadPrompt:
        """Run a prompt, float32 [n, hidden], outside of any sequence."""
        return read_prompt(self.model.decoder, torch.from_numpy(inputs_embeds))

    def _read_once(self, prompt: torch.Tensor) -> ReadPrompt:
        return self.read(prompt.numpy())

    def _append(self, inputs_embeds: np.ndarray) -> np.ndarray:
        logits = self.model.decoder(torch.from_numpy(inputs_embeds)[None], self._cache)
        return logits[0, -1].numpy()


class RememberingSession(TorchSession):
    """The same, which encodes every picture and reads every prompt once.

    At 1024 pixels and 0.5B a picture takes seconds, and 1 MB to remember; a prompt 1 second, and 7 MB.
    Convolutions run with channels last, which takes a fifth less time where two threads share them. While a
    picture is encoded, freed memory is kept for the next operation, which takes another fifth less.
    """

    def __init__(self, model: FastVLM, context_length: int) -> None:
        super().__init__(model, context_length)
        convert_conv2d_weight_memory_format(model.vision, torch.channels_last)
        self._features: dict[bytes, np.ndarray] = {}
        self._prompts: dict[bytes, ReadPrompt] = {}

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> float32 [num_image_tokens, hidden], not to be written to."""
        key = _key(pixel_values)
        if key not in self._features:
            pixels = torch.from_numpy(pixel_values).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), freed_blocks_kept():
                self._features[key] = self.model.encode_image(pixels)[0].numpy()
            self._features[key].flags.writeable = False
        return self._features[key]

    def read(self, inputs_embeds: np.ndarray) -> ReadPrompt:
        """Run a prompt, float32 [n, hidden], whatever is known of it, and remember what it leaves."""
        self._prompts[_key(inputs_embeds)] = found = super().read(inputs_embeds)
        return found

    def teacher_forced(self, inputs_embeds: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Logits after the embeddings and after each token, float32 [m + 1, vocab]; begins no sequence."""
        known = self._prompts.get(_key(inputs_embeds)) or super().read(inputs_embeds)
        return forced_logits(self.model.decoder, known, torch.from_numpy(token_ids)).numpy()

    def _read_once(self, prompt: torch.Tensor) -> ReadPrompt:
        embeds = prompt.numpy()
        return self._prompts.get(_key(embeds)) or self.read(embeds)


def _key(values: np.ndarray) -> bytes:
    return hashlib.sha256(values.tobytes()).digest()
