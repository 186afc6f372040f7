"""Sizes in bytes, as people write them."""

import pytest

from lora_jax.config.types import size_text, to_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("8 gib", 8 * 2**30), ("512M", 512 * 10**6), ("1.5KiB", 1536), ("77", 77), (77, 77), ("2 TB", 2 * 10**12)],
)
def test_sizes(text, size):
    assert to_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", 0, "0.2", True, None, [8], "8 bananas", "1e3", "8GBB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="such as 8GB"):
        to_bytes(text)


def test_sizes_for_people():
    assert [size_text(s) for s in (999, 1000, 8 * 10**9, 123_456_789)] == ["999 B", "1 KB", "8 GB", "123 MB"]
