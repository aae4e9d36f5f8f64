import pytest

from fastvlm_convert.amounts import parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9), ("4 gb", 4 * 10**9), ("1.5GiB", 3 << 29), ("800M", 800 * 10**6), ("64k", 64_000),
        ("2TB", 2 * 10**12), ("512MiB", 512 << 20), ("123", 123), ("123B", 123), ("1.5", 1),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "nan", "4 iB", "4XB", "4GB5", "1,5GB", "9" * 30])
def test_what_is_no_size(text):
    assert parse_size(text) is None


@pytest.mark.parametrize("size", [999, 12_300, 4_500_000, 78_000_000_000])
def test_what_is_printed_can_be_typed(size):
    assert parse_size(size_text(size)) == pytest.approx(size, rel=0.06)
