from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.errors import RequestError
from fanfold.quantity import (
    Limit,
    format_bytes,
    format_count,
    format_duration,
    format_rate,
    parse_bytes,
    parse_duration_s,
    parse_share,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GB", 8 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512MB", 512 * 10**6),
        (1024, 1024),
        ("1024", 1024),
        (" 64 kib ", 64 * 1024),
        ("0", 0),
        ("0.1KiB", 102),
        ("9223372036854775807", 2**63 - 1),
        ("0.3GB", 300_000_000),  # in floats this is 299,999,999.99999994
    ],
)
def test_bytes_are_read_exactly_gb_decimal_and_gib_binary(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1", -1, "8 GBs", "1e9", "1_000", "٣GB", "1..5GB", True, "9" * 5000, "nan", "1,5GB", "9EiB"],
)
def test_bytes_that_mean_nothing_are_refused(text):
    with pytest.raises(RequestError) as refused:
        parse_bytes(text, name="--memory-per-unit")
    assert refused.value.asked == "--memory-per-unit cannot be read"
    assert len(refused.value.found) <= 80
    assert "GiB" in refused.value.allowed


def test_a_single_letter_is_refused_with_both_ways_to_write_it():
    with pytest.raises(RequestError) as refused:
        parse_bytes("8G", name="--memory")
    assert refused.value.found == "'8G'"
    assert refused.value.do == "write --memory=8GB (powers of 1000) or --memory=8GiB (powers of 1024)"


def test_too_many_bytes_are_told_to_be_fewer():
    with pytest.raises(RequestError) as refused:
        parse_bytes("100EB")
    assert refused.value.do == "write a smaller number"


def test_a_share_counts_against_the_rows_seen():
    limit = parse_share("5%")
    assert limit == Limit(share=Fraction(5, 100))
    assert limit.allows(5, 100)
    assert not limit.allows(6, 100)
    assert limit.allows(0, 0)


def test_a_count_does_not_depend_on_the_rows_seen():
    limit = parse_share("12")
    assert limit == parse_share(12) == Limit(count=12)
    assert limit.allows(12, 12)
    assert not limit.allows(13, 10**9)


def test_a_share_at_its_limit_is_allowed_where_floats_would_refuse():
    assert 0.29 * 100 < 29  # the trap
    assert parse_share("29%").allows(29, 100)


@given(st.integers(0, 10_000))
def test_a_limit_is_written_as_it_is_read(hundredths):
    limit = Limit(share=Fraction(hundredths, 10_000))
    assert parse_share(str(limit)) == limit
    assert parse_share(str(Limit(count=hundredths))) == Limit(count=hundredths)


@pytest.mark.parametrize("text", ["", "%", "-5%", "101%", "5 percent", "1.5", -3, True, "5%%"])
def test_limits_that_mean_nothing_are_refused(text):
    with pytest.raises(RequestError) as refused:
        parse_share(text, name="--max-failures")
    assert refused.value.allowed == "a share from 0% to 100%, or a whole number of rows"
    assert "--max-failures=5%" in refused.value.do


def test_a_fraction_is_refused_with_the_percentage_it_probably_means():
    with pytest.raises(RequestError) as refused:
        parse_share("0.05", name="--max-failures")
    assert refused.value.do.startswith("write --max-failures=5% for a share")


def test_a_limit_is_either_a_share_or_a_count():
    for fields in ({}, {"share": Fraction(1, 2), "count": 1}):
        with pytest.raises(RequestError) as refused:
            Limit(**fields)
        assert refused.value.allowed == "exactly one of the two"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), (90, 90), (0.25, 0.25), ("90s", 90), ("500ms", 0.5), ("1.5h", 5400), ("1h30m", 5400),
     ("1h 30min", 5400), ("2 d", 172_800), ("0", 0), ("10 SEC", 10)],
)  # fmt: skip
def test_durations_are_read_in_seconds(text, seconds):
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1x", "-1s", -1, float("nan"), float("inf"), True, "1h30", "40000d", "1:30"])
def test_durations_that_mean_nothing_are_refused(text):
    with pytest.raises(RequestError) as refused:
        parse_duration_s(text, name="--timeout")
    assert refused.value.asked == "--timeout cannot be read"
    assert refused.value.do == "write for example --timeout=90s, --timeout=1.5h or --timeout=1h30m"


def test_bytes_are_written_with_three_digits_and_decimal_units():
    written = [format_bytes(value) for value in (0, 512, 999, 1000, 1_500_000_000, 25_276_510_208, 999_999, 2**63)]
    assert written == ["0 B", "512 B", "999 B", "1.00 kB", "1.50 GB", "25.3 GB", "1.00 MB", "9.22 EB"]


@given(st.integers(0, 9 * 10**18))
def test_written_bytes_are_read_back_within_half_a_percent(num_bytes):
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.0051)


def test_durations_are_written_with_at_most_two_units():
    values = (
        0,
        0.45,
        0.9999,
        3.14,
        12,
        59.6,
        200,
        3599.7,
        7500,
        86_399,
        97_200,
        -90,
        float("inf"),
        float("nan"),
    )
    assert [format_duration(value) for value in values] == [
        "0 ms", "450 ms", "1.0 s", "3.1 s", "12 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "2 h 05 min",
        "1 d 00 h", "1 d 03 h", "-1 min 30 s", "unknown", "unknown",
    ]  # fmt: skip


def test_counts_are_written_in_threes():
    assert [format_count(value) for value in (0, 999, 12345, -1234567)] == [
        "0",
        "999",
        "12,345",
        "-1,234,567",
    ]


def test_rates_name_their_unit():
    assert format_rate(12345.6) == "12,346 rows/s"
    assert format_rate(3.4159, "tokens") == "3.42 tokens/s"
    assert format_rate(0) == "0 rows/s"
    assert format_rate(1.3e11, "FLOP") == "130 GFLOP/s"
    assert format_rate(1.46e10, "B") == "14.6 GB/s"
    assert format_rate(float("inf")) == "unknown"
