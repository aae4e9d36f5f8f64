import threading

import numpy as np
import pytest

from fastvlm_convert.prompt_cache import PromptCache
from fastvlm_convert.serve.prompt_caches import PromptCaches, open_prompt_caches
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.session import KvPrefix


def features(value: float = 1.0) -> np.ndarray:
    """Of 4 x 16 x 4 = 256 bytes."""
    return np.full((4, 16), value, np.float32)


def prefix(value: float = 1.0) -> KvPrefix:
    """Of 2 x 4 x 10 x 8 x 2 = 1280 bytes."""
    return KvPrefix(0, 10, tuple(np.full((4, 10, 8), value, np.float16) for _ in range(2)))


def test_it_is_what_the_decode_loop_takes():
    cache: PromptCache = PromptCaches(1000, 10_000).of_model("m")
    assert cache.get_features("a") is None
    cache.put_features("a", features(3))
    np.testing.assert_array_equal(cache.get_features("a"), features(3))
    assert cache.get_prefix("a") is None
    cache.put_prefix("a", prefix(4))
    found = cache.get_prefix("a")
    assert (found.start, found.stop, len(found.values)) == (0, 10, 2)
    np.testing.assert_array_equal(found.values[1], prefix(4).values[1])


def test_bytes_are_those_of_the_arrays_and_never_more_than_allowed():
    caches = PromptCaches(1000, 3000)
    cache = caches.of_model("m")
    for i in range(10):
        cache.put_features(str(i), features(i))
        cache.put_prefix(str(i), prefix(i))
        assert caches.bytes["feature"] == min(i + 1, 3) * 256
        assert caches.bytes["prefix"] == min(i + 1, 2) * 1280
    assert [i for i in range(10) if cache.get_features(str(i)) is not None] == [7, 8, 9]
    assert [i for i in range(10) if cache.get_prefix(str(i)) is not None] == [8, 9]


def test_models_share_the_room_and_nothing_else():
    caches = PromptCaches(1000, 3000)
    one, other = caches.of_model("one"), caches.of_model("other")
    one.put_features("a", features(1))
    assert other.get_features("a") is None
    other.put_features("a", features(2))
    assert one.get_features("a")[0, 0] == 1
    assert caches.bytes["feature"] == 512
    assert caches.of_model("one").get_features("a")[0, 0] == 1


def test_nobody_changes_what_is_kept():
    cache = PromptCaches(1000, 10_000).of_model("m")
    given = features()
    cache.put_features("a", given)
    cache.put_prefix("a", prefix())
    for array in (given, cache.get_features("a"), *cache.get_prefix("a").values):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 5


def test_a_part_of_a_large_array_does_not_keep_the_whole():
    large = np.zeros((1, 400, 16), np.float32)
    cache = PromptCaches(1000, 10_000).of_model("m")
    cache.put_features("a", large[0, :4])
    assert cache.get_features("a").base is None
    large[:] = 7
    assert not cache.get_features("a").any()
    large[0, 0, 0] = 1  # and whoever holds the large one can go on


def test_lookups_are_counted():
    caches = PromptCaches(1000, 0)
    cache = caches.of_model("m")
    cache.get_features("a")
    cache.put_features("a", features())
    cache.get_features("a")
    cache.put_prefix("a", prefix())
    cache.get_prefix("a")
    expected = {("feature", "hit"): 1, ("feature", "miss"): 1, ("prefix", "hit"): 0, ("prefix", "miss"): 1}
    assert caches.lookups == expected


def test_the_limits_are_those_of_the_settings():
    assert open_prompt_caches(Settings(cache_enabled=False)) is None
    caches = open_prompt_caches(Settings(feature_cache_mb=0.0005, prefix_cache_mb=0))
    cache = caches.of_model("m")
    for i in range(3):
        cache.put_features(str(i), features())
        cache.put_prefix(str(i), prefix())
    assert caches.bytes == {"feature": 256, "prefix": 0}


def test_many_threads_at_once():
    caches = PromptCaches(2000, 5000)
    faults = []

    def work(model):
        cache = caches.of_model(model)
        for i in range(500):
            key = str(i % 10)
            found = cache.get_prefix(key)
            if found is not None and not all((array == int(key)).all() for array in found.values):
                faults.append(key)
            cache.put_prefix(key, prefix(int(key)))
            if caches.bytes["prefix"] > 5000:
                faults.append("bytes")

    threads = [threading.Thread(target=work, args=(str(i % 2),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert sum(caches.lookups[("prefix", result)] for result in ("hit", "miss")) == 2000
