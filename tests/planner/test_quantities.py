"""Option values with units."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import typer

from hetis.planner.cli import quantities


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (quantities.tpot_limit, "50ms", 0.05),
        (quantities.tpot_limit, "0.05", 0.05),
        (quantities.tpot_limit, "50s", 50.0),
        (quantities.ttft_limit, "5", 5.0),
        (quantities.ttft_limit, "2", 2.0),
        (quantities.ttft_limit, "none", quantities.NO_LIMIT),
        (quantities.ttft_limit, "None", quantities.NO_LIMIT),
        (quantities.positive_duration, "1min", 60.0),
        (quantities.ratio, "0.5%", 0.005),
        (quantities.ratio, "0.005", 0.005),
        (quantities.ratio, "0", 0.0),
        (quantities.rate, "12.5", 12.5),
    ],
)
def test_values_with_and_without_units(parse: Callable[[str], float], text: str, value: float) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (quantities.ttft_limit, "soon"),
        (quantities.tpot_limit, "50"),
        (quantities.tpot_limit, "2.0"),
        (quantities.tpot_limit, "50."),
        (quantities.tpot_limit, "5e1"),
        (quantities.ttft_limit, "500"),
        (quantities.ttft_limit, "0"),
        (quantities.ttft_limit, "-1s"),
        (quantities.ttft_limit, "50GB"),
        (quantities.positive_duration, "none"),
        (quantities.ratio, "one percent"),
        (quantities.ratio, "-1%"),
        (quantities.rate, "0"),
        (quantities.rate, "nan"),
        (quantities.rate, "inf"),
        (quantities.rate, "4/s"),
    ],
)
def test_nonsense_is_a_usage_error(parse: Callable[[str], float], text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse(text)
