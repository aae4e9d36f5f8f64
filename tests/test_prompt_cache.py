import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_convert.prompt import Prompt
from fastvlm_convert.prompt_cache import MemoryPromptCache, image_key, prefix_keys, split_prompt
from fastvlm_convert.session import KvPrefix

IMAGE_TOKENS = 16


def prompt(*segments, answers_at=()):
    """A prompt with a picture between segments."""
    images = tuple(np.full((1, 3, 2, 2), number, np.float32) for number in range(len(segments) - 1))
    return Prompt(tuple(np.asarray(s, np.int64) for s in segments), images, answers_at)


def shape_of(chunk):
    return [s.tolist() for s in chunk.segments]


def split(whole):
    return split_prompt(whole, IMAGE_TOKENS)


class TestSplit:
    def test_a_chunk_ends_after_each_picture(self):
        chunks = split(prompt([1, 2], [3, 4], [5, 6]))
        assert [shape_of(c) for c in chunks] == [[[1, 2], []], [[3, 4], []], [[5, 6]]]
        assert [float(c.images[0].flat[0]) for c in chunks[:2]] == [0, 1]

    def test_and_where_an_earlier_answer_begins(self):
        chunks = split(prompt([1, 2], [3, 4, 5, 6, 7, 8], answers_at=((1, 2), (1, 4))))
        assert [shape_of(c) for c in chunks] == [[[1, 2], []], [[3, 4]], [[5, 6]], [[7, 8]]]

    def test_text_alone_is_one(self):
        assert [shape_of(c) for c in split(prompt([1, 2, 3]))] == [[[1, 2, 3]]]
        assert [shape_of(c) for c in split(prompt([1]))] == [[[1]]]

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (prompt([1], [2, 3, 4]), [[[1], [2]], [[3, 4]]]),
            (prompt([1], [2], [3, 4, 5, 6]), [[[1], [2]], [[], []], [[3, 4, 5, 6]]]),
            (prompt([1], [], [3, 4, 5]), [[[1], []], [[], [3]], [[4, 5]]]),  # no text to take from
            (prompt([1, 2, 3, 4, 5, 6], answers_at=((0, 3),)), [[[1, 2, 3]], [[4, 5, 6]]]),
            (prompt([1], [2, 3, 4, 5], answers_at=((1, 2),)), [[[1], [2]], [[3, 4, 5]]]),
        ],
    )
    def test_pictures_end_at_even_positions_and_answers_begin_where_they_did(self, given, expected):
        assert [shape_of(c) for c in split(given)] == expected

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (prompt([1, 2], [3]), [[[1, 2], [3]]]),  # one token behind a picture
            (prompt([1, 2], []), [[[1, 2], []]]),  # none
            (prompt([1, 2, 3, 4], answers_at=((0, 0),)), [[[1, 2, 3, 4]]]),
            (prompt([1, 2, 3, 4, 5], answers_at=((0, 4),)), [[[1, 2, 3, 4, 5]]]),
            (prompt([1, 2, 3, 4, 5, 6], answers_at=((0, 3), (0, 4))), [[[1, 2, 3]], [[4, 5, 6]]]),
        ],
    )
    def test_no_chunk_is_a_single_token(self, given, expected):
        assert [shape_of(c) for c in split(given)] == expected

    @given(
        st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4).filter(
            lambda segments: len(segments) > 1 or segments[0]
        ),
        st.integers(1, 5),
        st.data(),
    )
    def test_chunks_are_the_prompt(self, segments, image_tokens, data):
        places = [(s, p) for s, ids in enumerate(segments) for p in range(len(ids) + 1)]
        cuts = data.draw(st.lists(st.sampled_from(places), max_size=4, unique=True).map(sorted))
        whole = prompt(*segments, answers_at=tuple(cuts))
        chunks = split_prompt(whole, image_tokens)
        assert sum(c.length(image_tokens) for c in chunks) == whole.length(image_tokens)
        assert [id(i) for c in chunks for i in c.images] == [id(i) for i in whole.images]
        flat = [
            part
            for c in chunks
            for n, s in enumerate(c.segments)
            for part in (["picture"] if n else []) + s.tolist()
        ]
        assert flat == [
            part for n, ids in enumerate(segments) for part in (["picture"] if n else []) + list(ids)
        ]
        if whole.length(image_tokens) > 1:
            assert min(c.length(image_tokens) for c in chunks) > 1


class TestKeys:
    def test_equal_beginnings_have_equal_keys(self):
        first, second = (split(prompt([1, 2], [3, 4], end)) for end in ([5, 6], [7, 8, 9]))
        ours, theirs = prefix_keys(first, ["a", "b"]), prefix_keys(second, ["a", "b"])
        assert ours[:2] == theirs[:2]
        assert ours[2] != theirs[2]
        assert all(len(key) == 64 for key in ours)

    def test_whatever_differs_before_changes_all_keys_after(self):
        keys = [
            prefix_keys(split(prompt(*segments)), images)[-2]
            for segments, images in [
                (([1, 2], [3, 4], [5, 6]), ["a", "b"]),
                (([1, 2], [3, 4], [5, 6]), ["b", "a"]),
                (([1, 2], [3, 4], [5, 6]), ["ab", ""]),
                (([1, 9], [3, 4], [5, 6]), ["a", "b"]),
                (([1, 2, 3], [4], [5, 6]), ["a", "b"]),
                (([1], [2, 3, 4], [5, 6]), ["a", "b"]),
                (([2, 1], [3, 4], [5, 6]), ["a", "b"]),
            ]
        ]
        assert len(set(keys)) == len(keys)

    def test_where_a_prompt_is_split_is_part_of_its_keys(self):
        """Keys and values may differ in their last bits where the chunks were others."""
        whole = prefix_keys([prompt([1, 2, 3, 4])], [])
        split = prefix_keys([prompt([1, 2]), prompt([3, 4])], [])
        assert whole[-1] != split[-1]

    def test_a_picture_is_its_values_and_its_shape(self):
        pixels = np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)
        others = [pixels.reshape(1, 3, 4, 2), pixels + 1e-6, np.flip(pixels, 3)]
        keys = {image_key(values) for values in (pixels, *others)}
        assert len(keys) == 4
        assert image_key(np.asfortranarray(pixels)) == image_key(pixels)
        assert image_key(pixels.astype(np.float64)) == image_key(pixels)


class TestMemory:
    def test_the_latest_are_kept_within_their_bytes(self):
        cache = MemoryPromptCache(feature_bytes=3 * 40, prefix_bytes=0)
        for name in "abc":
            cache.put_features(name, np.zeros(10, np.float32))
        cache.get_features("a")
        cache.put_features("d", np.zeros(10, np.float32))
        assert [name for name in "abcd" if cache.get_features(name) is not None] == ["a", "c", "d"]
        cache.put_features("e", np.zeros(20, np.float32))
        assert [name for name in "abcde" if cache.get_features(name) is not None] == ["d", "e"]
        cache.put_features("d", np.zeros(1, np.float32))  # takes the place of the old one
        cache.put_features("f", np.zeros(9, np.float32))
        assert [name for name in "def" if cache.get_features(name) is not None] == ["d", "e", "f"]

    def test_what_is_larger_than_the_cache_is_not_kept(self):
        cache = MemoryPromptCache(prefix_bytes=100)
        small, large = (KvPrefix(0, n, (np.zeros((1, n, 1), np.float32),) * 2) for n in (8, 16))
        assert (small.num_bytes, large.num_bytes) == (64, 128)
        cache.put_prefix("small", small)
        assert cache.get_prefix("small") is small
        cache.put_prefix("large", large)
        assert cache.get_prefix("large") is None

    def test_features_and_prefixes_are_apart(self):
        cache = MemoryPromptCache()
        cache.put_features("key", np.ones(3))
        assert cache.get_prefix("key") is None
        assert cache.get_features("key") is not None
