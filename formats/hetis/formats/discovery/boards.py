"""Matches a tool's product name to a GPU type of the catalogue."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from hetis.formats import catalogue
from hetis.formats.catalogue import UnknownNameError
from hetis.formats.discovery.found import FoundGpus

LEAVE_OUT = "none"
"""Given instead of a product's type to exclude it from the plan."""

# Memory as drivers report it is up to 7% below the board's nominal size (ECC and firmware take some).
_MOST_DIFFERENCE = 0.12
_SHARED = re.compile(r"-SHARED$")  # appended by GFD if several pods take turns on a GPU


class UnclearBoardError(Exception):
    """A product name means no GPU type, or several. The text says which, and what to do."""


def said_types(pairs: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the types in ``--gpu PRODUCT=TYPE`` options, by product, and the problems with them."""
    said, wrong = dict[str, str](), list[str]()
    for pair in pairs:
        product, equals, name = (part.strip() for part in pair.partition("="))
        if not (product and equals and name):
            wrong.append(f"--gpu {pair[:80]!r}: expected PRODUCT=TYPE, such as a100=A100-SXM-80GB")
            continue
        try:
            said[product.casefold()] = name if name.lower() == LEAVE_OUT else catalogue.find_gpu(name).gpu.name
        except UnknownNameError as error:
            wrong.append(f"--gpu {pair[:80]!r}: {error}")
    return said, wrong


def board_of(gpus: FoundGpus, said: Mapping[str, str]) -> str:
    """Return the name in the catalogue, or `LEAVE_OUT` if the user said so.

    Boards that share a name are distinguished by memory, then by the hints.

    Raises:
        UnclearBoardError: the product matches no type, or more than one.
    """
    product = _SHARED.sub("", gpus.product)
    for spelled in (gpus.product, product):
        if spelled.casefold() in said:
            return said[spelled.casefold()]
    candidates, suggested = _candidates(product)
    fitting = [name for name in candidates if _holds(name, gpus.memory_bytes)]
    for hint in filter(None, gpus.hints):
        if len(fitting) > 1:
            told = {*_candidates(f"{product} {hint}")[0], *_candidates(hint)[0]}
            fitting = [name for name in fitting if name in told] or fitting
    if len(fitting) == 1:
        return fitting[0]
    how = f"; --gpu '{gpus.product}=TYPE' says which ('={LEAVE_OUT}' leaves them out)"
    if len(fitting) > 1:
        raise UnclearBoardError(f"GPU {gpus.product!r} could be {' or '.join(fitting)}{how}")
    if candidates and gpus.memory_bytes is not None:
        has = ", ".join(f"{name} with {_gib(catalogue.find_gpu(name).gpu.memory_bytes)} GiB" for name in candidates)
        raise UnclearBoardError(
            f"GPU {gpus.product!r} has {_gib(gpus.memory_bytes)} GiB; the catalogue knows {has}{how}"
        )
    near = f", did you mean {' or '.join(suggested)}?" if suggested else ""
    raise UnclearBoardError(f"GPU {gpus.product!r} is not in the catalogue{near}{how}")


def _candidates(product: str) -> tuple[Collection[str], Collection[str]]:
    """Return the types that a name may mean or, if there are none, those nearest to it."""
    try:
        return (catalogue.find_gpu(product).gpu.name,), ()
    except UnknownNameError as error:
        return (error.candidates, ()) if error.ambiguous else ((), error.candidates)


def _holds(name: str, memory_bytes: int | None) -> bool:
    known = catalogue.find_gpu(name).gpu.memory_bytes
    return memory_bytes is None or abs(memory_bytes / known - 1) <= _MOST_DIFFERENCE


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f}"
