"""Bytes as typed and as shown."""

import pytest

from server.memory_size import format_memory, parse_memory


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("512MiB", 512 * 1024**2),
        ("2GiB", 2 * 1024**3),
        ("2g", 2 * 1024**3),
        ("2 GB", 2 * 10**9),
        ("1.5", 1536 * 1024**2),
        ("1", 1024**3),
        ("1073741824", 1024**3),
        ("4096b", 4096),
        ("0", 0),
    ],
)
def test_parses_what_people_write(text: str, num_bytes: int) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "5 bananas", "-1GiB", "1e9", "GiB"])
def test_refuses_the_rest_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of memory; write 512MiB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(17, "17 B"), (1024**3, "1 GiB"), (269_060_552, "256.6 MiB"), (5 * 1024**5, "5120 TiB")]
)
def test_shows_one_decimal(num_bytes: int, text: str) -> None:
    assert format_memory(num_bytes) == text
