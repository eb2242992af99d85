"""Values of options as users write them (``500ms``, ``0.5%``, ``prefill,decode``), and their shell completions.

Catalogues and strategies are loaded when a value is read or completed, so that ``--help`` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import typer

from hetis.commands.verb import one_of
from hetis.formats.models.dtypes import KV_PRECISIONS, PRECISIONS, chosen_precision
from hetis.formats.units import (
    parse_bytes,
    parse_duration,
    parse_limit,
    parse_link_bandwidth,
    parse_ratio,
)
from hetis.solver.plan import LEAST_DEMAND_RPS, Role

NO_LIMIT = float("inf")
ALL = "all"
MOST_SETTING = 10**9  # the limit of `EngineSettings`, whose module loads numpy: too slow for --help

T = TypeVar("T")

# --- quantities


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


duration = partial(_parsed, parse_duration)  # may be 0: ``30h``
ratio = partial(_parsed, parse_ratio)  # ``0.5%`` or ``0.005``
size = partial(_parsed, parse_bytes)
bandwidth = partial(_parsed, parse_link_bandwidth)  # bytes per second: ``100Gbps`` or ``2GB/s``


def ttft_limit(text: str) -> float:
    """Parse a limit on the time to first token in seconds; `NO_LIMIT` for ``none``."""
    return _limit(text, "TTFT")


def tpot_limit(text: str) -> float:
    """Parse a limit on the time per output token in seconds; `NO_LIMIT` for ``none``."""
    return _limit(text, "TPOT")


def _limit(text: str, name: str) -> float:
    if text.strip().lower() == "none":
        return NO_LIMIT
    return _positive(_parsed(lambda text: parse_limit(text, name), text), text)


def positive_duration(text: str) -> float:
    """Parse seconds: ``50ms``, ``2s``, ``2``."""
    return _positive(_parsed(parse_duration, text), text)


def device_at(text: str, option: str, example: str = "a device and a time such as a100/0@30s") -> tuple[str, float]:
    """Parse a device, or a node, and a time in seconds, the value of an ``option``: ``a100/0@30s``."""
    device, at, time = text.rpartition("@")
    if not at or not device:
        raise typer.BadParameter(f"{text!r} is not {example}", param_hint=f"'{option}'")
    try:
        return device, _parsed(parse_duration, time)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint=f"'{option}'") from None


def gap(text: str) -> float:
    """Parse a gap: ``0.5%`` or ``0.005``."""
    value = ratio(text)
    if value < 1:
        return value
    if text.rstrip().endswith("%"):
        raise typer.BadParameter(f"{text!r} is out of range, must be below 100%")
    raise typer.BadParameter(f"{text!r} means {value:.0%} of the best, did you mean {text.strip()}%?")


def share(text: str) -> float:
    """Parse a ratio above 0 and up to 1."""
    value = ratio(text)
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text!r} is out of range, must be above 0 and at most 100%{_percent(text, value)}")
    return value


def prefix_hit_rate(text: str) -> float | Literal["trace"]:
    """Parse a share of prompt tokens below 1 (``0.4`` or ``40%``), or ``trace``."""
    return "trace" if text.strip().lower() == "trace" else below_one(text, ", or trace")


def burstiness(text: str) -> float:
    """Parse a coefficient of variation of at least 0."""
    from hetis.solver.workload import MOST_BURSTINESS

    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None
    if not 0 <= value <= MOST_BURSTINESS:
        raise typer.BadParameter(f"{text!r} is out of range, must be from 0 to {MOST_BURSTINESS:g}")
    return value


def below_one(text: str, otherwise: str = "") -> float:
    """Parse a ratio of at least 0 and below 1, such as a relative error: with 1, work could take no time."""
    value = ratio(text)
    if not 0 <= value < 1:
        hint = _percent(text, value) if value < 100 else ""
        raise typer.BadParameter(f"{text!r} is out of range, must be at least 0% and below 100%{otherwise}{hint}")
    return value


def _percent(text: str, value: float) -> str:
    """Return ``, did you mean 90%?`` for a plain ``90``, whose sign was probably forgotten, or an empty string."""
    is_plain = not text.rstrip().endswith("%")
    return f", did you mean {text.strip()}%?" if is_plain and 1 < value <= 100 else ""


def tokens(text: str) -> int:
    """Parse a number of tokens: ``32768``, ``32k`` (of 1,024), ``1m``."""
    digits, factor = text.strip().lower(), 1
    for unit, of_unit in (("k", 1024), ("m", 1024 * 1024)):
        if digits.endswith(unit):
            digits, factor = digits[:-1], of_unit
    if not digits.isdecimal() or not 1 <= int(digits) * factor <= MOST_SETTING:
        raise typer.BadParameter(f"{text!r} is not a number of tokens such as 32768 or 32k")
    return int(digits) * factor


def fitted_engine(text: str) -> str:
    """Parse the name of an engine whose memory is known."""
    return one_of(text, ("vllm", "vllm-hetis", "sglang"))


def engine_version(text: str) -> str:
    """Parse the version of an engine, which begins with numbers."""
    if not text.removeprefix("v")[:1].isdecimal():
        raise typer.BadParameter(f"{text!r} is not a version such as 0.32.0")
    return text


def rate(text: str) -> float:
    """Parse requests per second, above zero."""
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number of requests per second") from None
    return _positive(value, text)


def demand(text: str) -> float:
    """Parse a demanded rate, which must be high enough to plan for."""
    value = rate(text)
    if value < LEAST_DEMAND_RPS:
        raise typer.BadParameter(f"{text!r} is too low, must be at least {LEAST_DEMAND_RPS:g}")
    return value


def _positive(value: float, text: str) -> float:
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{text!r} is out of range, must be above zero and finite")
    return value


# --- the family of plans


@dataclass(frozen=True, slots=True)
class Names:
    """Names in the order specified; a class of its own, because typer takes a tuple for several arguments."""

    names: tuple[str, ...]


def strategy(text: str) -> str:
    return one_of(text, _strategies())


def strategies(text: str) -> Names:
    """Parse names of strategies separated by commas, each once; ``all`` for every one."""
    return _several(text, _strategies(), strategy)


def engine(text: str) -> str:
    """Parse the name of an engine."""
    return one_of(text, _engines())


def engines(text: str) -> Names:
    """Parse names of engines separated by commas, each once; ``all`` for every one."""
    return _several(text, _engines(), engine)


def _several(text: str, known: Sequence[str], read: Callable[[str], str]) -> Names:
    names = [name.strip() for name in text.split(",")]
    if names == [ALL]:
        return Names(tuple(known))
    if ALL in names:
        raise typer.BadParameter(f"{text!r} combines {ALL} with names: give {ALL} alone, or names")
    return Names(tuple(dict.fromkeys(map(read, names))))


def roles(text: str) -> frozenset[Role]:
    """Parse roles separated by commas; prefill and decode replicas need one another."""
    known = [role.value for role in Role]
    found = frozenset(Role(one_of(name.strip().lower(), known)) for name in text.split(","))
    if (Role.PREFILL in found) != (Role.DECODE in found):
        alone, missing = (Role.PREFILL, Role.DECODE) if Role.PREFILL in found else (Role.DECODE, Role.PREFILL)
        raise typer.BadParameter(f"{text!r} has {alone} replicas without {missing} replicas, which they need")
    return found


def chunks(text: str) -> frozenset[int]:
    """Parse sizes of prefill chunks separated by commas."""
    from hetis.solver.engine_rules import MOST_CHUNKS

    sizes = [size.strip() for size in text.split(",")]
    if len(sizes) > MOST_CHUNKS:
        raise typer.BadParameter(f"{len(sizes)} sizes are given, at most {MOST_CHUNKS} are allowed")
    return frozenset(_count(size, "a whole number of tokens") for size in sizes)


def setting(text: str) -> int:
    """Parse one setting for every engine."""
    return _count(text, "a whole number")


def _count(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and 1 <= int(text) <= MOST_SETTING):
        raise typer.BadParameter(f"{text[:40]!r} is not {what}, 1 to {MOST_SETTING}")
    return int(text)


def weights(text: str) -> str:
    """Check the precision of the weights, with optional other ones for single GPU types."""
    return _checked(text, lambda text: chosen_precision(text, PRECISIONS))


def kv(text: str) -> str:
    """Check the precision of KV, with optional other ones for single GPU types."""
    return _checked(text, lambda text: chosen_precision(text, KV_PRECISIONS))


def mtp(text: str) -> str:
    from hetis.formats.models.document import drafts

    return _checked(text, drafts)


def _checked(text: str, read: Callable[[str], object]) -> str:
    _parsed(read, text)
    return text


def _strategies() -> list[str]:
    from hetis.solver.placement.families import STRATEGIES

    return list(STRATEGIES)


def _engines() -> list[str]:
    from hetis.solver.placement.families import ENGINES

    return list(ENGINES)
