"""Words for shell completion: names of the catalogues, loaded on Tab only."""

from __future__ import annotations


def model_names(incomplete: str) -> list[str]:
    """Return the models of the catalogue that start with this, with or without their organisation."""
    from hetis.formats.catalogue import models

    names = [entry.model.name for entry in models()]
    short = [name.rpartition("/")[2] for name in names]
    # Keep the case that was typed, or the shell would drop the word; the catalogue ignores case anyway.
    return [incomplete + n[len(incomplete) :] for n in short + names if n.lower().startswith(incomplete.lower())]


def strategy_names(incomplete: str) -> list[str]:
    """Return the strategies that start with this."""
    from hetis.solver.placement.families import STRATEGIES

    return [name for name in STRATEGIES if name.startswith(incomplete.lower())]


def engine_names(incomplete: str) -> list[str]:
    """Return the engines that start with this."""
    from hetis.solver.placement.families import ANY_ENGINE, ENGINES

    return [name for name in (*ENGINES, ANY_ENGINE) if name.startswith(incomplete.lower())]


def workload_names(incomplete: str) -> list[str]:
    """Return the traces of the catalogue that start with this."""
    from hetis.formats.catalogue import workloads

    names = [entry.workload.name for entry in workloads()]
    return [name for name in names if name.startswith(incomplete.lower())]
