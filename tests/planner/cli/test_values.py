"""Values of options with units."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import typer

from hetis.planner.cli.parameters import values


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
        (values.demand, "1e-3", 1e-3),
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
        (values.demand, "0"),
        (values.demand, "9e-4"),
    ],
)
def test_nonsense_is_a_usage_error(parse: Callable[[str], float], text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse(text)


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (values.share, "90", "'90' is out of range, must be above 0 and at most 100%, did you mean 90%?"),
        (values.share, "100", "'100' is out of range, must be above 0 and at most 100%, did you mean 100%?"),
        (values.share, "101", "'101' is out of range, must be above 0 and at most 100%"),
        (values.share, "190%", "'190%' is out of range, must be above 0 and at most 100%"),
        (values.share, "0", "'0' is out of range, must be above 0 and at most 100%"),
        (values.below_one, "20", "'20' is out of range, must be at least 0% and below 100%, did you mean 20%?"),
        (values.below_one, "1", "'1' is out of range, must be at least 0% and below 100%"),
        (values.below_one, "100", "'100' is out of range, must be at least 0% and below 100%"),
        (values.burstiness, "11", "'11' is out of range, must be from 0 to 10"),
        (values.burstiness, "nan", "'nan' is out of range, must be from 0 to 10"),
        (values.burstiness, "high", "'high' is not a number"),
        (
            values.prefix_hit_rate,
            "40",
            "'40' is out of range, must be at least 0% and below 100%, or trace, did you mean 40%?",
        ),
    ],
)
def test_a_share_whose_percent_sign_was_forgotten_is_told(parse: Callable[[str], object], text: str, said: str) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        parse(text)
    assert str(refused.value) == said
