"""How a prompt gets into a session, and what need not be computed of it again."""

import time
from collections.abc import Sequence
from itertools import islice

import numpy as np

from fastvlm_convert.prompt import Prompt
from fastvlm_convert.prompt_cache import PromptCache, image_key, prefix_keys, split_prompt
from fastvlm_convert.session import KvPrefix, ReusesPrefixes, Session


def embed_prompt(session: Session, prompt: Prompt, features: Sequence[np.ndarray]) -> np.ndarray:
    """Embeddings of a whole prompt, image features spliced in; float32 [tokens, hidden]."""
    parts = []
    for i, segment in enumerate(prompt.segments):
        if i:
            parts.append(features[i - 1])
        if len(segment):
            parts.append(session.embed(segment))
    return np.concatenate(parts)


class PromptReader:
    """How a prompt gets into a session's cache, and what is known of it already.

    Args:
        session: The model.
        prompt: The prompt.
        cache: What is known of earlier prompts, if anything is kept.
        image_keys: Keys of the images where they are known.

    Attributes:
        encoded_images: Images that were encoded.
        vision_s: Seconds that went into that.
        prefill_s: Seconds that the rest took.
    """

    def __init__(
        self, session: Session, prompt: Prompt, cache: PromptCache | None, image_keys: Sequence[str]
    ) -> None:
        self.encoded_images = 0
        self.vision_s = self.prefill_s = 0.0
        self._session = session
        self._cache = cache
        # A runtime that cannot begin in the middle takes the prompt whole.
        is_split = isinstance(session, ReusesPrefixes)
        self._chunks = split_prompt(prompt, session.num_image_tokens) if is_split else [prompt]
        self._image_keys: Sequence[str] = ()
        self._prefix_keys: list[str] = []
        self._known: list[KvPrefix] = []
        if cache is None:
            return
        self._image_keys = image_keys or [image_key(image) for image in prompt.images]
        if isinstance(session, ReusesPrefixes):
            self._prefix_keys = prefix_keys(self._chunks, self._image_keys)
            for key in self._prefix_keys[:-1]:  # the last chunk's logits are needed
                prefix = cache.get_prefix(key)
                if prefix is None:
                    break
                self._known.append(prefix)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that need not be read."""
        return self._known[-1].stop if self._known else 0

    def read(self, features: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Begin a new sequence with the prompt; logits of its last position, float32 [vocab].

        Args:
            features: Of all images, float32 [num_image_tokens, hidden], where they are encoded already.
        """
        start = time.perf_counter()
        unread = self._chunks[len(self._known) :]
        first = sum(len(chunk.images) for chunk in self._chunks[: len(self._known)])
        if features is None:
            images = [image for chunk in unread for image in chunk.images]
            needed = [self._encoded(image, number) for number, image in enumerate(images, first)]
        else:
            needed = list(features[first:])
        encoded = time.perf_counter()
        logits = self._prefill(unread, needed)
        self.vision_s, self.prefill_s = encoded - start, time.perf_counter() - encoded
        return logits

    def _prefill(self, chunks: Sequence[Prompt], features: Sequence[np.ndarray]) -> np.ndarray:
        session = self._session
        if not isinstance(session, ReusesPrefixes):
            return session.prefill(embed_prompt(session, chunks[0], features))
        session.start_from(self._known)
        position = self.cached_tokens
        left = iter(features)
        logits = np.zeros(0, np.float32)
        for number, chunk in enumerate(chunks, len(self._known)):
            logits = session.append(embed_prompt(session, chunk, list(islice(left, len(chunk.images)))))
            start, position = position, position + chunk.length(session.num_image_tokens)
            if self._cache is not None:
                self._cache.put_prefix(self._prefix_keys[number], session.copy_prefix(position, start))
        return logits

    def _encoded(self, image: np.ndarray, number: int) -> np.ndarray:
        if self._cache is None:
            self.encoded_images += 1
            return self._session.encode_image(image)
        features = self._cache.get_features(self._image_keys[number])
        if features is None:
            self.encoded_images += 1
            features = self._session.encode_image(image)
            self._cache.put_features(self._image_keys[number], features)
        return features
