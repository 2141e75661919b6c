"""Sizes read and print as zramctl's do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdzram.units import format_seconds, format_size, format_sizes, parse_seconds, parse_size, said, some_of


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1K", 1024),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("1.5G", 3 << 29),
        (" 512 MiB ", 512 << 20),
        ("1tb", 10**12),
        ("8E", 1 << 63),
        ("0.1G", 26214 * 4096),  # 107,374,182.4 bytes, down to a whole block
    ],
)
def test_a_size_means_what_zramctl_says(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "clue"),
    [
        ("", "is not a size"),
        ("big", "is not a size"),
        ("-1G", "is not a size"),
        ("1X", "unknown suffix 'X'"),
        ("1iB", "unknown suffix 'iB'"),
        ("1Gigs", "unknown suffix 'Gigs'"),
        ("9E", "largest size"),
        ("50%", "percentage is not allowed here"),
        ("0.5", "less than what is counted"),
        ("0.3K", "less than what is counted"),  # 307.2 bytes: as a limit, 0 would be none
    ],
)
def test_a_wrong_size_is_named_with_the_reason(text: str, clue: str) -> None:
    with pytest.raises(ValueError, match=clue):
        parse_size(text)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ((8 << 20, 1 << 20), ("8M", "1M")),
        ((8 << 20, 8 << 20), ("8M", "8M")),
        ((8 << 20, (8 << 20) - 512), ("8388608 bytes", "8388096 bytes")),
        ((1, 1 << 40, (1 << 40) + 1), ("1 bytes", "1099511627776 bytes", "1099511627777 bytes")),
    ],
)
def test_sizes_that_differ_never_read_alike_beside_each_other(sizes: tuple[int, ...], told: tuple[str, ...]) -> None:
    assert format_sizes(*sizes) == told


def test_a_percentage_is_a_share_of_what_it_is_taken_of() -> None:
    assert parse_size("50%", of=8 << 30) == 4 << 30
    assert parse_size("12.5%", of=1 << 30) == 1 << 27


def test_a_share_that_comes_to_nothing_is_no_size() -> None:
    """As a limit, 0 would be none: the least that anybody can ask for must not be all that there is."""
    with pytest.raises(ValueError, match="less than what is counted"):
        parse_size("0.0000001%", of=1 << 20)
    with pytest.raises(ValueError, match="less than what is counted"):
        parse_size("50%", of=0)  # memory.high of a cgroup may be that, for a while


@pytest.mark.parametrize("text", ["0%", "101%"])
def test_a_percentage_outside_its_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at most 100"):
        parse_size(text, of=1 << 30)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (74, "74B"),
        (1023, "1023B"),
        (1024, "1K"),
        (4096, "4K"),
        (1536, "1.5K"),
        (1 << 30, "1G"),
        (4_089_446, "3.9M"),
        ((1 << 20) - 1, "1M"),
        (-(3 << 29), "-1.5G"),
        (1 << 63, "8E"),
    ],
)
def test_a_size_prints_with_one_decimal_and_one_letter(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_what_is_printed_reads_back_within_its_rounding(size: int) -> None:
    number, letter = format_size(size)[:-1], format_size(size)[-1]
    unit = parse_size(f"1{letter}")
    assert abs(float(number) * unit - size) <= 0.05 * unit + 1e-6 * size


def test_a_stretch_of_time_is_told_in_its_two_largest_units() -> None:
    assert [format_seconds(s) for s in (5, 65, 3700, 90000)] == ["5 s", "1 min 5 s", "1 h 1 min", "1 d 1 h"]


def test_of_many_names_the_first_are_told_and_how_many_more() -> None:
    assert [some_of(["a", "b", "c"][:count], 2) for count in range(4)] == ["", "a", "a, b", "a, b and 1 more"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 90), ("0", 0), ("30s", 30), ("10m", 600), ("1.5h", 5400), ("7d", 604800), (".5", 0.5)),
        *((text, None) for text in ("", "h", "-1", "1w", "1 h", "1H", "1h30m", "nan", "inf", "1e3", "1.", "soon")),
    ],
)
def test_a_time_is_seconds_or_has_a_letter_behind_it(text: str, seconds: float | None) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("name", "told"), [("disk", "disk"), ("a b", "a b"), ("disk ", "'disk '"), (" disk", "' disk'"), (" ", "' '")]
)
def test_a_blank_at_a_names_end_is_seen(name: str, told: str) -> None:
    assert said(name) == told
    assert some_of([name, "x"], 1) == f"{told} and 1 more"
