"""Quantities parse exactly and their text form gives the identical value back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats import units

QUANTITIES = st.floats(min_value=0, max_value=1e300, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("1.5 KiB", 1536), ("7B", 7), ("0B", 0), ("1e3MB", 10**9)],
)
def test_bytes(text: str, size: int) -> None:
    assert units.parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("100Gbps", 12.5e9), ("600GB/s", 600e9), ("64GiB/s", 64 * 2**30), ("8bps", 1.0), ("1.2TB/s", 1.2e12)],
)
def test_bandwidth(text: str, bytes_per_s: float) -> None:
    assert units.parse_bandwidth(text) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "seconds"), [("20us", 20e-6), ("50ms", 0.05), ("2s", 2.0), ("0.05", 0.05), ("5min", 300.0), ("3ns", 3e-9)]
)
def test_durations(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


def test_a_duration_may_be_required_to_have_a_unit() -> None:
    with pytest.raises(
        ValueError, match=r"^'20' is not a duration: expected a number and one of ns, us, ms, s, min, h$"
    ):
        units.parse_duration("20", bare=False)


@pytest.mark.parametrize(("text", "ratio"), [("0.5%", 0.005), ("0.005", 0.005), ("100%", 1.0), ("1e-4", 1e-4)])
def test_ratios(text: str, ratio: float) -> None:
    assert units.parse_ratio(text) == ratio


def test_flops() -> None:
    assert units.parse_flops("312TFLOPS") == 312e12


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_bytes_round_trip(size: int) -> None:
    assert units.parse_bytes(units.format_bytes(size)) == size


@given(QUANTITIES)
def test_bandwidth_round_trips(value: float) -> None:
    assert units.parse_bandwidth(units.format_bandwidth(value)) == value


@given(QUANTITIES)
def test_durations_round_trip(value: float) -> None:
    assert units.parse_duration(units.format_duration(value)) == value


@given(QUANTITIES)
def test_flops_round_trip(value: float) -> None:
    assert units.parse_flops(units.format_flops(value)) == value


@given(st.text(max_size=100))
def test_any_text_parses_or_is_refused_with_a_reason(text: str) -> None:
    parsers = (units.parse_bytes, units.parse_bandwidth, units.parse_duration, units.parse_flops, units.parse_ratio)
    for parse in parsers:
        try:
            value: float | str = parse(text)
        except ValueError as error:
            value = str(error)
        if isinstance(value, str):
            assert any(words in value for words in ("expected", "must be", "too large"))
        else:
            assert value >= 0


def test_short_texts_are_chosen() -> None:
    assert units.format_bytes(80 * 2**30) == "80GiB"
    assert units.format_bandwidth(12.5e9) == "100Gbps"
    assert units.format_bandwidth(936e9) == "936GB/s"
    assert units.format_duration(20e-6) == "20us"
    assert units.format_duration(2.0) == "2s"
    assert units.format_flops(312e12) == "312TFLOPS"


def test_seconds_per_byte_are_the_inverse_of_a_bandwidth() -> None:
    assert units.parse_seconds_per_byte("25Gbps") == 3.2e-10


def test_a_wrong_unit_lists_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"^'100Gb' is not a bandwidth: expected a number and one of bps, Kbps, Mbps,"):
        units.parse_bandwidth("100Gb")
    for unclear in ("100Gb", "100Gb/s"):
        with pytest.raises(ValueError, match=r"did you mean 100Gbps, which is bits, or 100GB/s, bytes\?\)$"):
            units.parse_bandwidth(unclear)


@pytest.mark.parametrize(("text", "meant"), [("16GBps", "16GB/s"), ("1.5 TBps", "1.5TB/s"), ("60GiBps", "60GiB/s")])
def test_bytes_per_second_are_not_mistaken_for_bits(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"(did you mean {meant}?)") + "$"):
        units.parse_bandwidth(text)


def test_a_unit_in_the_wrong_case_is_put_right_when_only_one_fits() -> None:
    with pytest.raises(ValueError, match=r"\(did you mean 80GiB\?\)$"):
        units.parse_bytes("80gib")


def test_negative_quantities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^'-20us' is negative, must be >= 0$"):
        units.parse_duration("-20us")


@pytest.mark.parametrize("text", ["1e999B", "9" * 60 + "B"])
def test_sizes_beyond_64_bits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is too large for a size"):
        units.parse_bytes(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_has_no_text_form_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"has no text form, must be finite and >= 0"):
        units.format_bandwidth(value)


def test_a_moment_without_a_zone_is_utc_unless_it_needs_one() -> None:
    assert units.parse_moment("2027-01-31").isoformat() == "2027-01-31T00:00:00+00:00"
    assert units.parse_moment("2027-01-31T01:00+01:00", needs_zone=True) == units.parse_moment("2027-01-31T00:00:00Z")
    for text, needs_zone in (("2027-01-31", True), ("tomorrow", False)):
        with pytest.raises(ValueError, match=f"'{text}' is not a time: write it like 2027-01-31T00:00:00Z"):
            units.parse_moment(text, needs_zone=needs_zone)
