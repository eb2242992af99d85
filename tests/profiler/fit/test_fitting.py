"""The fitter recovers the law behind the points, never goes below zero, and tolerates outliers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.profiler.fitting import fit_pieces, mape, predict


def roofline_points() -> tuple[np.ndarray, np.ndarray]:
    """Return points of ``max(1e-5 + 1.25 b, 2e-5 + 1.5 f)``."""
    f, b = np.meshgrid(np.geomspace(1e-6, 1e-2, 25), np.geomspace(1e-5, 1e-3, 9))
    features = np.stack([np.ones(f.size), f.ravel(), b.ravel()], axis=1)
    return features, np.maximum(1e-5 + 1.25 * features[:, 2], 2e-5 + 1.5 * features[:, 1])


def test_a_roofline_is_found_again() -> None:
    features, seconds = roofline_points()
    fit = fit_pieces(features, seconds, num_pieces=2)
    assert fit.mape < 0.01
    assert sorted(fit.pieces) == [
        pytest.approx((1e-5, 0.0, 1.25), rel=0.05, abs=1e-7),
        pytest.approx((2e-5, 1.5, 0.0), rel=0.05, abs=1e-2),
    ]


def test_a_few_outliers_do_not_move_it() -> None:
    features, seconds = roofline_points()
    seconds = seconds.copy()
    seconds[::20] *= 3.0
    fit = fit_pieces(features, seconds, num_pieces=2)
    clean = roofline_points()[1]
    assert mape(fit.pieces, features, clean) < 0.03


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-1)), min_size=4, max_size=30)
)
def test_coefficients_are_finite_and_not_negative(rows: list[tuple[float, float, float]]) -> None:
    table = np.array(rows)
    features = np.stack([np.ones(len(rows)), table[:, 0], table[:, 1]], axis=1)
    for num_pieces in (1, 2, 3):
        fit = fit_pieces(features, table[:, 2], num_pieces=num_pieces)
        assert all(np.isfinite(a) and a >= 0 for piece in fit.pieces for a in piece)
        assert fit.mape == pytest.approx(mape(fit.pieces, features, table[:, 2]))
        assert (predict(fit.pieces, features) >= 0).all()
