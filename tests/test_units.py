"""Quantities as people write them."""

import pytest

from thinwire.units import (
    parse_bytes,
    parse_flops,
    parse_rate,
    parse_seconds,
    show_bytes,
    show_count,
    show_rate,
    show_seconds,
)


def test_quantities_are_parsed_with_their_units() -> None:
    assert parse_bytes("80 GiB") == 80 * 2**30
    assert parse_bytes("1.5 GB") == 1_500_000_000
    assert parse_bytes(4096) == 4096
    assert parse_rate("100 Gbit/s") == 12.5e9
    assert parse_rate("25 GB/s") == 25e9
    assert parse_rate("20 Mbps") == 2.5e6
    assert parse_seconds("2 us") == pytest.approx(2e-6)
    assert parse_seconds("1.5 h") == 5400
    assert parse_flops("312 TFLOP/s") == 312e12


@pytest.mark.parametrize("text", ["fast", "10 Gbit", "-1 GB/s", "nan", "10 parsec/s", True, ""])
def test_a_wrong_rate_is_answered_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="100 Gbit/s"):
        parse_rate(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["80", "80 Gigs", "-4 GiB", "inf"])
def test_sizes_without_a_known_unit_are_refused_unless_plain(text: str) -> None:
    if text == "80":
        assert parse_bytes(text) == 80
    else:
        with pytest.raises(ValueError, match="80 GiB"):
            parse_bytes(text)


def test_quantities_are_shown_as_people_read_them() -> None:
    assert show_bytes(1.5 * 2**30) == "1.50 GiB"
    assert show_rate(12.5e9) == "100 Gbit/s"
    assert show_count(1_240_000) == "1.24 M"
    assert show_seconds(0.0135) == "13.5 ms"
    assert show_seconds(3900) == "1 h 05 min"
    assert show_seconds(75) == "1 min 15 s"
