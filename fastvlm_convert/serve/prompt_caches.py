"""What the server keeps of prompts, for all bundles: image features, and keys and values of beginnings."""

from typing import Final

import numpy as np

from fastvlm_convert.serve.caches import ByteCache, cache_key
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.session import KvPrefix

_MEGABYTE: Final = 1_000_000


class PromptCaches:
    """Features and prefixes in memory. The limits are those of all bundles together.

    Args:
        feature_bytes: Most bytes of image features; 0 keeps none.
        prefix_bytes: Most bytes of keys and values; 0 keeps none.
    """

    def __init__(self, feature_bytes: int, prefix_bytes: int) -> None:
        self._features: ByteCache[np.ndarray] = ByteCache(feature_bytes, lambda features: features.nbytes)
        self._prefixes: ByteCache[KvPrefix] = ByteCache(prefix_bytes, lambda prefix: prefix.num_bytes)

    def of_model(self, model: str) -> "ModelPromptCache":
        """The part of one model.

        Args:
            model: What tells it from all others, such as a bundle's hash and target.
        """
        return ModelPromptCache(model, self._features, self._prefixes)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes that are kept, by cache, as `EngineStatus.cache_bytes` has them."""
        return {"feature": self._features.bytes, "prefix": self._prefixes.bytes}

    @property
    def lookups(self) -> dict[tuple[str, str], int]:
        """Hits and misses, as `EngineStatus.cache_lookups` has them."""
        return {
            ("feature", "hit"): self._features.hits,
            ("feature", "miss"): self._features.misses,
            ("prefix", "hit"): self._prefixes.hits,
            ("prefix", "miss"): self._prefixes.misses,
        }


class ModelPromptCache:
    """One model's features and prefixes; a `prompt_cache.PromptCache`."""

    def __init__(self, model: str, features: ByteCache[np.ndarray], prefixes: ByteCache[KvPrefix]) -> None:
        self._model = model
        self._features = features
        self._prefixes = prefixes

    def get_features(self, key: str) -> np.ndarray | None:
        """Image tokens of a picture, float32 [num_image_tokens, hidden], that nobody can change."""
        return self._features.get(cache_key(self._model, key))

    def put_features(self, key: str, features: np.ndarray) -> None:
        """Keep image tokens, float32 [num_image_tokens, hidden]."""
        self._features.put(cache_key(self._model, key), _frozen(features))

    def get_prefix(self, key: str) -> KvPrefix | None:
        """Keys and values of a chunk, that nobody can change."""
        return self._prefixes.get(cache_key(self._model, key))

    def put_prefix(self, key: str, prefix: KvPrefix) -> None:
        """Keep keys and values of a chunk."""
        values = tuple(_frozen(array) for array in prefix.values)
        self._prefixes.put(cache_key(self._model, key), KvPrefix(prefix.start, prefix.stop, values))


def open_prompt_caches(settings: Settings) -> PromptCaches | None:
    """The caches that the settings ask for; None where caches are off."""
    if not settings.cache_enabled:
        return None
    return PromptCaches(int(settings.feature_cache_mb * _MEGABYTE), int(settings.prefix_cache_mb * _MEGABYTE))


def _frozen(array: np.ndarray) -> np.ndarray:
    """The array, which can no longer be changed; a copy if it is a part of one that would be kept whole."""
    kept = array if array.flags.owndata else array.copy()
    kept.flags.writeable = False
    return kept
