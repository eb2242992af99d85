"""Replicas that were not chosen, in words that the terminal and the page share."""

from __future__ import annotations

import itertools
import re

from hetis.planner.report.figures import digits, percent, plural
from hetis.solver.plan import Plan, RunnerUp

_STAGE = re.compile(
    r"(?P<gpu>\S+) TP(?P<tp>\d+) x(?P<copies>\d+)(?P<shared> EP\d+)? L(?P<layers>\d+)"
    r"(?: \(\+(?P<workers>.+) attention workers\))?"
)
_WORTH = re.compile(
    r"its GPUs are worth (?P<worth>[\d.]+) requests/s elsewhere(?:, its (?P<role>\w+) work (?P<own>[\d.]+))?"
)


def distinct_runners_up(plan: Plan) -> list[RunnerUp]:
    """Return the runners-up, those once that differ only in their zones or nodes."""
    return list({(one.shape, digits(one.rate), one.reason): one for one in plan.runners_up}.values())


def shape_words(shape: str) -> str:
    """Return ``decode: L4 TP4 x1 L20 | H100 TP2 x2 L60`` in words, or unchanged if it cannot be parsed."""
    role, colon, stages = shape.rpartition(": ")
    found = [_STAGE.fullmatch(stage) for stage in stages.split(" | ")]
    if not all(found):
        return _folded(shape)
    runs = itertools.groupby((match for match in found if match is not None), key=re.Match[str].group)
    words = ", then ".join(_stage_words(next(equal), 1 + len(list(equal))) for _, equal in runs)
    return f"{role} only: {words}" if colon else words


def _stage_words(match: re.Match[str], count: int) -> str:
    """Return ``2 stages of 20 layers, each on 4 × L4 in TP4`` for that many equal stages."""
    tp, copies, gpu = int(match["tp"]), int(match["copies"]), match["gpu"]
    cards = f"one {gpu}" if tp == 1 else f"{tp} × {gpu} in TP{tp}"
    layers = plural(int(match["layers"]), "layer")
    text = f"{layers} on {cards}" if count == 1 else f"{count} stages of {layers}, each on {cards}"
    text += f" ({copies} copies{' that share experts' if match['shared'] else ''})" if copies > 1 else ""
    return text + (f" with {match['workers']} as attention workers" if match["workers"] else "")


def reason_words(reason: str, rate: float) -> str:
    """Return why a runner-up was not chosen.

    If its GPUs are worth more elsewhere, that is by how much it is worse; any other reason is returned unchanged.
    """
    match = _WORTH.fullmatch(reason)
    if match is None or not float(match["worth"]) > 0:
        return reason
    elsewhere = float(match["worth"])
    if match["role"]:
        verb = "serve" if match["role"] == "own" else match["role"]
        own = f"what it would {verb} is worth {digits(float(match['own']))} there"
        return f"as they are used in the plan its GPUs serve {digits(elsewhere)} requests/s; {own}"
    return f"{percent(1.0 - rate / elsewhere)} less than the {digits(elsewhere)} requests/s its GPUs serve in the plan"


def _folded(shape: str) -> str:
    """Merge consecutive equal stages: ``A | A | B`` becomes ``2 × A | B``."""
    runs = [(stage, len(list(equal))) for stage, equal in itertools.groupby(shape.split(" | "))]
    return " | ".join(stage if count == 1 else f"{count} × {stage}" for stage, count in runs)
