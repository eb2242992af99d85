"""GPU types that could be added to a fleet: the catalogue's types with a price, and their default profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hetis.formats import catalogue
from hetis.profiler.defaults import default_profile
from hetis.solver.errors import InvalidProblemError

if TYPE_CHECKING:
    from hetis.solver.placement.infeasible import Offer


def catalogue_market() -> Sequence[Offer]:
    """Return every type of the catalogue that has a known price and a profile, shipped or modelled."""
    from hetis.solver.placement.infeasible import Offer

    offers = []
    for entry in catalogue.gpus():
        if entry.gpu.usd_per_hour is not None:
            try:
                _, profile = default_profile(entry.gpu)
            except InvalidProblemError:
                continue
            offers.append(Offer(gpu=entry.gpu, profile=profile))
    return offers
