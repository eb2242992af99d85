"""The limit on open files is raised where that is allowed, and refused where it is too low for the command."""

from __future__ import annotations

import resource

import pytest

from hetis.formats.descriptors import raise_descriptor_limit
from hetis.formats.errors import DocumentError

NONE = resource.RLIM_INFINITY


class Limits:
    """The limits of a process whose system accepts no more than ``accepts``."""

    def __init__(self, soft: int, hard: int, *, accepts: int = 1 << 62) -> None:
        self.now, self._accepts = (soft, hard), accepts

    def getrlimit(self, _: int) -> tuple[int, int]:
        return self.now

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        soft, hard = limits
        if soft > self._accepts or (soft == NONE and self._accepts < 1 << 62) or hard != self.now[1]:
            raise ValueError("current limit exceeds maximum limit")
        self.now = limits


@pytest.mark.parametrize(
    ("limits", "enough", "raised"),
    [
        (Limits(64, 4096), None, 4096),
        (Limits(64, NONE), None, NONE),
        (Limits(64, 1 << 20), 4096, 4096),
        (Limits(64, 1024), 4096, 1024),
        (Limits(8192, 1 << 20), 4096, 8192),  # it is never lowered
        (Limits(NONE, NONE), 4096, NONE),
        (Limits(256, NONE, accepts=10_240), None, 10_240),  # macOS
        (Limits(256, 256), None, 256),
    ],
)
def test_the_limit_is_raised_as_far_as_it_may_be(
    limits: Limits, enough: int | None, raised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", limits.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limits.setrlimit)
    assert raise_descriptor_limit("hetis-planner", least=256, enough=enough) == raised
    assert limits.now[0] == raised


def test_a_limit_that_is_too_low_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(64, 255)
    monkeypatch.setattr(resource, "getrlimit", limits.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limits.setrlimit)
    with pytest.raises(DocumentError) as caught:
        raise_descriptor_limit("hetis-planner", least=256)
    assert str(caught.value) == (
        "ulimit -n: hetis-planner may have at most 255 files and connections open, and needs at least 256: raise the"
        " hard limit (ulimit -Hn, LimitNOFILE= of a systemd unit, --ulimit nofile= of a container)"
    )
