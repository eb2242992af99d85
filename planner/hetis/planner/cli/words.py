"""Words that the shell completes: names of the catalogues, loaded when a Tab asks for them."""

from __future__ import annotations


def model_names(incomplete: str) -> list[str]:
    """Models of the catalogue that start with this, the organisation in front being optional."""
    from hetis.formats.catalogue import models

    names = [entry.model.name for entry in models()]
    short = [name.rpartition("/")[2] for name in names]
    # What was typed keeps its case, or the shell would drop the word; the catalogue ignores case anyway.
    return [incomplete + n[len(incomplete) :] for n in short + names if n.lower().startswith(incomplete.lower())]


def strategy_names(incomplete: str) -> list[str]:
    """Strategies that start with this."""
    from hetis.solver.placement.strategies import STRATEGIES

    return [name for name in STRATEGIES if name.startswith(incomplete.lower())]


def engine_names(incomplete: str) -> list[str]:
    """Engines that start with this."""
    from hetis.solver.placement.engines import ANY_ENGINE, ENGINES

    return [name for name in (*ENGINES, ANY_ENGINE) if name.startswith(incomplete.lower())]


def workload_names(incomplete: str) -> list[str]:
    """Traces of the catalogue that start with this."""
    from hetis.formats.catalogue import workloads

    names = [entry.workload.name for entry in workloads()]
    return [name for name in names if name.startswith(incomplete.lower())]
