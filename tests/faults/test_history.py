"""The checker finds every planted violation, and none in a correct history."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.faults.history import Findings, History, Led, Read, Sighting, Write, check


def led(planner: str, epoch: int, time_s: float) -> Led:
    return Led(planner=planner, epoch=epoch, time_s=time_s, taken_s=time_s)


def serving(planner: str, time_s: float) -> list[Sighting]:
    """Return the reports of a planner that takes over while a replica serves, whose agents arrive one by one."""
    states = [("nodes/a", "SUSPECT"), ("replicas/0", "SERVING"), ("nodes/a", "READY")]
    return [
        Sighting(planner=planner, resource=f"clusters/served/{name}", state=state, time_s=time_s + 0.1 * number)
        for number, (name, state) in enumerate(states)
    ]


def well(seed: int = 0, num_writes: int = 40) -> tuple[History, Read]:
    """Return a register that was written in sequence, with terms, refusals and lost answers."""
    chance = random.Random(seed)
    history, version, value, now_s = History(first=(1, "first")), 1, "first", 100.0
    leader = 0
    history.terms.append(led("p0", 1, now_s))
    history.sightings += serving("p0", now_s)
    for number in range(num_writes):
        now_s += 1
        if chance.random() < 0.1:
            leader += 1
            history.faults.append("kill")
            history.terms.append(led(f"p{leader % 2}", leader + 1, now_s))
            history.sightings += serving(f"p{leader % 2}", now_s)
            now_s += 0.1
        write = Write(
            value=f"w{number}", base=version, began_s=now_s, ended_s=now_s + 0.5, planner=f"p{leader % 2}", version=None
        )
        fate = chance.choice(["done", "done", "done", "refused", "in doubt and done", "in doubt"])
        if fate == "refused":
            write = replace(write, refused=True)
        if "done" in fate:
            version, value = version + 1, write.value
        if fate == "done":
            write = replace(write, version=version)
        history.writes.append(write)
        if chance.random() < 0.3:
            history.reads.append(Read(version=version, value=value, began_s=now_s + 0.6, ended_s=now_s + 0.7))
    return history, Read(version=version, value=value, began_s=now_s + 1, ended_s=now_s + 2)


def found(history: History, last: Read) -> Findings:
    return check(history, last)


@pytest.mark.parametrize("seed", range(20))
def test_a_history_that_is_well_has_no_violation(seed: int) -> None:
    history, last = well(seed)
    findings = found(history, last)
    assert findings.violations == ()
    assert findings.acknowledged + findings.refused + findings.in_doubt == 40
    assert (findings.lost, findings.doubled) == (0, 0)
    assert sum(findings.faults.values()) == len(history.terms) - 1


def acknowledged(history: History) -> int:
    return max(n for n, write in enumerate(history.writes) if write.version is not None)


@pytest.mark.parametrize("seed", range(5))
def test_a_lost_write_is_found(seed: int) -> None:
    history, last = well(seed)
    position = acknowledged(history)
    write = history.writes[position]
    other = Write(value="other", base=write.base, began_s=write.began_s, ended_s=write.ended_s, version=write.version)
    history.writes.append(other)
    findings = found(history, last)
    assert findings.lost > 0
    assert any(violation.startswith(f"lost: {write.value}") for violation in findings.violations)
    history.writes.remove(other)
    gone = replace(last, version=history.first[0], value=history.first[1], began_s=last.began_s + 9)
    assert found(history, gone).lost > 0


def test_a_write_that_was_done_twice_is_found() -> None:
    history, last = well(3)
    write = history.writes[acknowledged(history)]
    again = replace(
        last, version=last.version + 1, value=write.value, began_s=last.began_s + 9, ended_s=last.ended_s + 9
    )
    findings = found(history, again)
    assert findings.doubled == 1
    assert any(violation.startswith(f"doubled: {write.value}") for violation in findings.violations)


def test_a_version_that_nobody_made_is_found() -> None:
    history, last = well(4)
    made = next(write for write in history.writes if write.version is not None)
    history.writes.remove(made)
    assert any(violation.startswith("ghost: version") for violation in found(history, last).violations)


def test_a_refused_write_that_was_done_is_found() -> None:
    history, last = well(5)
    refused = next(write for write in history.writes if write.refused)
    stale = Read(version=last.version, value=refused.value, began_s=last.ended_s + 1, ended_s=last.ended_s + 2)
    assert any("was refused, and read" in violation for violation in found(history, stale).violations)


def test_a_write_in_doubt_that_was_done_on_another_version_than_it_builds_on_is_found() -> None:
    """A planner that writes without comparing would do this: no answer was sent, but the register has the value."""
    history, last = well(9)
    lost_race = replace(
        history.writes[-1], value="late", base=last.version - 1, version=None, refused=False, ended_s=last.began_s
    )
    history.writes += [lost_race, replace(lost_race, value="other", base=last.version)]  # the last explains the version
    assert found(history, last).violations == ()
    read = replace(last, version=last.version + 1, value="late", began_s=last.ended_s + 1, ended_s=last.ended_s + 2)
    assert found(history, replace(read, value="other")).violations == ()
    (violation,) = found(history, read).violations
    assert violation == f"swap: late was to follow version {lost_race.base} and was read as version {read.version}"


def test_a_stale_read_is_found() -> None:
    history, last = well(6)
    history.reads.append(Read(version=1, value="first", began_s=last.ended_s + 1, ended_s=last.ended_s + 2))
    assert any(violation.startswith("order: a read of version 1") for violation in found(history, last).violations)


def test_an_acknowledgement_after_the_term_is_found() -> None:
    history, last = well(7)
    write = history.writes[acknowledged(history)]
    history.terms.append(led("p9", 99, write.began_s - 0.01))
    violations = found(history, last).violations
    assert any(violation.startswith(f"term: {write.planner} acknowledged {write.value}") for violation in violations)


def test_an_epoch_that_does_not_grow_is_found() -> None:
    history, last = well(8)
    history.terms.append(led("p9", 1, last.ended_s))
    assert any(violation.startswith("epoch: p9") for violation in found(history, last).violations)


@pytest.mark.parametrize(
    ("resource", "state"),
    [("nodes/a", "LOST"), ("replicas/0", "STOPPED"), ("replicas/0", "FAILED"), ("replicas/0", "STARTING")],
)
def test_a_leader_that_gives_up_what_serves_is_found(resource: str, state: str) -> None:
    """This happened when a new leader took over while the old one held its agents."""
    history, last = well(10)
    assert found(history, last).sightings == len(history.sightings) > 3
    given_up = Sighting(planner="p9", resource=f"clusters/served/{resource}", state=state, time_s=last.ended_s)
    (violation,) = check(replace(history, sightings=[*history.sightings, given_up]), last).violations
    assert violation == f"given up: p9 reported clusters/served/{resource} {state} at {last.ended_s:.3f}"
    # What never served cannot be given up.
    other = replace(given_up, resource=f"clusters/served/{resource}-new")
    assert check(replace(history, sightings=[*history.sightings, other]), last).violations == ()
