"""Option values with units."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import typer

from hetis.planner.cli import values


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (values.tpot_limit, "50ms", 0.05),
        (values.tpot_limit, "0.05", 0.05),
        (values.tpot_limit, "50s", 50.0),
        (values.ttft_limit, "5", 5.0),
        (values.ttft_limit, "2", 2.0),
        (values.ttft_limit, "none", values.NO_LIMIT),
        (values.ttft_limit, "None", values.NO_LIMIT),
        (values.positive_duration, "1min", 60.0),
        (values.ratio, "0.5%", 0.005),
        (values.ratio, "0.005", 0.005),
        (values.ratio, "0", 0.0),
        (values.rate, "12.5", 12.5),
    ],
)
def test_values_with_and_without_units(parse: Callable[[str], float], text: str, value: float) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (values.ttft_limit, "soon"),
        (values.tpot_limit, "50"),
        (values.tpot_limit, "2.0"),
        (values.tpot_limit, "50."),
        (values.tpot_limit, "5e1"),
        (values.ttft_limit, "500"),
        (values.ttft_limit, "0"),
        (values.ttft_limit, "-1s"),
        (values.ttft_limit, "50GB"),
        (values.positive_duration, "none"),
        (values.ratio, "one percent"),
        (values.ratio, "-1%"),
        (values.rate, "0"),
        (values.rate, "nan"),
        (values.rate, "inf"),
        (values.rate, "4/s"),
    ],
)
def test_nonsense_is_a_usage_error(parse: Callable[[str], float], text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse(text)
