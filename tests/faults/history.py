"""The record of a run with faults, and a checker for what must never happen.

Writers compare and swap one register. The etag on which a write builds and the one that it leads to are versions that
grow by one. A history is therefore linearizable if each version was made once, by a write that was in progress at some
moment between the version before and the one after, and no caller got a version that did not stay.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """A compare-and-swap of the register.

    Attributes:
        value: the value that is written, unique to this write.
        base: version on which it builds.
        began_s, ended_s: Unix time at the caller.
        version: version that the answer states, or None without an answer.
        refused: whether the answer states that nothing was changed.
        raced: whether it was refused because another write came first.
        planner: the planner that answered, if the caller calls only this one.
    """

    value: str
    base: int
    began_s: float
    ended_s: float
    version: int | None = None
    refused: bool = False
    raced: bool = False
    planner: str = ""

    @property
    def is_in_doubt(self) -> bool:
        return self.version is None and not self.refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A caller's view of the register."""

    version: int
    value: str
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Led:
    """The start of a planner's term: stored at ``taken_s``, with all open work taken over at ``time_s``."""

    planner: str
    epoch: int
    time_s: float
    taken_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A state of a node or replica, as a leading planner reported it to a watcher."""

    planner: str
    resource: str
    state: str
    time_s: float


@dataclass(slots=True)
class History:
    """The whole record; ``first`` is version and value of the register before the first write.

    Faults never hit agents or their connections to the planners, so that they could always reach the leader.
    """

    first: tuple[int, str]
    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    terms: list[Led] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The result of a check. ``violations`` are sentences; there must be none."""

    faults: Counter[str]
    acknowledged: int
    refused: int
    raced: int
    in_doubt: int
    in_doubt_and_done: int
    lost: int
    doubled: int
    sightings: int
    violations: tuple[str, ...]

    def __str__(self) -> str:
        faults = ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items())) or "none"
        return "\n".join(
            [
                f"faults injected        {sum(self.faults.values())} ({faults})",
                f"writes acknowledged    {self.acknowledged}",
                f"  of them lost         {self.lost}",
                f"  of them doubled      {self.doubled}",
                f"writes refused         {self.refused}",
                f"  of them lost races   {self.raced}",
                f"writes in doubt        {self.in_doubt} ({self.in_doubt_and_done} were done)",
                f"states reported        {self.sightings} of what serves",
                *(f"VIOLATION              {violation}" for violation in self.violations),
            ]
        )


def check(history: History, last: Read) -> Findings:
    """Compare a history with the final register, when no write is in progress any more."""
    acknowledged = [write for write in history.writes if write.version is not None]
    in_doubt = [write for write in history.writes if write.is_in_doubt]
    seen = [*history.reads, last]
    made = _values_by_version(history, seen)
    violations = list[str]()

    lost = 0
    for write in acknowledged:
        assert write.version is not None
        others = made[write.version] - {write.value}
        if write.version > last.version or others:
            lost += 1
            now = f"has {', '.join(sorted(others))}" if others else f"is gone: the register ends at {last.version}"
            violations.append(f"lost: {write.value} was acknowledged as version {write.version}, which {now}")
        if write.version != write.base + 1:
            violations.append(f"swap: {write.value} was to follow version {write.base} and made {write.version}")

    versions_of = dict[str, set[int]]()
    for version, values in made.items():
        for value in values:
            versions_of.setdefault(value, set()).add(version)
    doubled = [value for value, versions in versions_of.items() if len(versions) > 1]
    violations += [f"doubled: {value} is versions {sorted(versions_of[value])}" for value in doubled]

    # Every version up to the last was made by an acknowledged write or one in doubt.
    told = {write.version for write in acknowledged}
    untold = [version for version in range(history.first[0] + 1, last.version + 1) if version not in told]
    bases = Counter(write.base for write in in_doubt)
    for version in untold:
        if not bases[version - 1]:
            violations.append(f"ghost: version {version} was made, and by no write that may have made it")

    # A write in doubt made the version after its base, or nothing.
    base_of = {write.value: write.base for write in in_doubt}
    for read in seen:
        base = base_of.get(read.value)
        if base is not None and read.version != base + 1:
            violations.append(f"swap: {read.value} was to follow version {base} and was read as version {read.version}")

    known = {write.value for write in history.writes} | {history.first[1]}
    refused = {write.value for write in history.writes if write.refused}
    for read in seen:
        if read.value not in known:
            violations.append(f"ghost: {read.value} was read, and written by nobody")
        if read.value in refused:
            violations.append(f"ghost: {read.value} was refused, and read as version {read.version}")
    violations += _out_of_order(history, seen)
    violations += _after_their_term(history)
    violations += _given_up(history)
    return Findings(
        faults=Counter(history.faults),
        acknowledged=len(acknowledged),
        refused=len(refused),
        raced=sum(write.raced for write in history.writes),
        in_doubt=len(in_doubt),
        in_doubt_and_done=len(untold),
        lost=lost,
        doubled=len(doubled),
        sightings=len(history.sightings),
        violations=tuple(violations),
    )


def _values_by_version(history: History, seen: Sequence[Read]) -> dict[int, set[str]]:
    made: dict[int, set[str]] = {history.first[0]: {history.first[1]}}
    for write in history.writes:
        if write.version is not None:
            made.setdefault(write.version, set()).add(write.value)
    for read in seen:
        made.setdefault(read.version, set()).add(read.value)
    return made


def _out_of_order(history: History, seen: Sequence[Read]) -> list[str]:
    """Return violations of order: what begins after another has ended sees no older version."""
    ends = [(read.ended_s, read.version) for read in seen]
    ends += [(write.ended_s, write.version) for write in history.writes if write.version is not None]
    begins = [(read.began_s, read.version, f"a read of version {read.version}") for read in seen]
    begins += [
        (write.began_s, write.version, f"the write {write.value} as version {write.version}")
        for write in history.writes
        if write.version is not None
    ]
    ends.sort()
    found, newest, position = list[str](), 0, 0
    for began_s, version, what in sorted(begins):
        while position < len(ends) and ends[position][0] < began_s:
            newest = max(newest, ends[position][1])
            position += 1
        if version < newest:
            found.append(f"order: {what} began when version {newest} had been seen")
    return found


def _after_their_term(history: History) -> list[str]:
    """Return writes that a planner acknowledged after another began to lead, unless it leads again itself."""
    terms = sorted(history.terms, key=lambda term: term.time_s)
    found = [
        f"epoch: {later.planner} led with epoch {later.epoch} after {before.epoch}"
        for before, later in itertools.pairwise(terms)
        if later.epoch <= before.epoch
    ]
    for write in history.writes:
        if write.version is None or not write.planner:
            continue
        led = [term for term in terms if term.time_s < write.ended_s]
        # Several terms may have begun during the write, one of them its planner's.
        if led and all(
            term.planner != write.planner for term in [led[-1], *(t for t in led if t.time_s >= write.began_s)]
        ):
            found.append(
                f"term: {write.planner} acknowledged {write.value} at {write.ended_s:.3f}, after {led[-1].planner}"
                f" led from {led[-1].time_s:.3f}"
            )
    return found


def _given_up(history: History) -> list[str]:
    """Return cases in which a leader gave up what serves: a ready node became LOST, or a replica stopped serving."""
    found, well = list[str](), set[str]()
    for seen in sorted(history.sightings, key=lambda seen: seen.time_s):
        is_replica = "/replicas/" in seen.resource
        if seen.state in ("READY", "SERVING"):
            well.add(seen.resource)
        elif seen.resource in well and (is_replica or seen.state != "SUSPECT"):
            found.append(f"given up: {seen.planner} reported {seen.resource} {seen.state} at {seen.time_s:.3f}")
    return found
