"""Where results are kept, and doing without."""

import os
import shutil
from pathlib import Path

import pytest

from fastvlm_convert.user_cache import Kind, cache_folder, hold, is_cache_used, without_cache

KIND = Kind("things", "things", (3, 1), ".json")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_place_of_a_result_names_its_kind_and_its_version(own_cache):
    assert KIND.path("ab") == own_cache / "things" / "v3.1" / "ab.json"


def test_without_the_cache_results_go_elsewhere_and_are_gone_afterwards(own_cache):
    with without_cache():
        elsewhere = cache_folder()
        assert not elsewhere.is_relative_to(own_cache)
        assert elsewhere.is_dir()
        assert not is_cache_used()
        KIND.folder.mkdir(parents=True)
        with without_cache():
            assert cache_folder() != elsewhere
        assert cache_folder() == elsewhere
    assert not elsewhere.exists()
    assert cache_folder() == own_cache
    assert is_cache_used()


def test_it_is_used_again_after_an_error(own_cache):
    with pytest.raises(ValueError, match="no"), without_cache():
        raise ValueError("no")
    assert cache_folder() == own_cache


def test_nothing_is_held_that_is_not_there(own_cache):
    folder = own_cache / "a"
    assert not hold(folder)
    folder.mkdir(parents=True)
    assert hold(folder)
    shutil.rmtree(folder)
    assert not hold(folder)
    folder.mkdir()
    numbers = set()
    for _ in range(20):
        assert hold(folder)
        number = os.open(folder, os.O_RDONLY)
        os.close(number)
        numbers.add(number)
    assert len(numbers) <= 2  # one descriptor for a folder, however often it is used
