"""The status page of a running cluster in headless Chromium: the demo's, after a card became slow and a node died.

HETIS_AXE=node_modules/axe-core/axe.min.js python -m pytest -m soak tests/planner/service/status_page
"""

from __future__ import annotations

import io
import urllib.request
from pathlib import Path

import pytest

from examples.demo_cluster.story import Processes, Story, Teller
from tests.planner.browser import AXE, CHROMIUM, THEMES, browse, console, picture, pictures_folder, rules_broken

pytestmark = [pytest.mark.soak, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


class EnoughSeenError(Exception):
    """Ends the story early, as the rest is not needed."""


def page_of(address: str) -> str:
    request = urllib.request.Request(address, headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def test_the_page_of_a_running_cluster(tmp_path: Path) -> None:
    """The console stays empty while the page refreshes itself, and the page shows the events."""

    def look(chapter: str) -> None:
        address = processes.status_page
        if chapter == "slow":
            processes.wait_until(lambda: "done in" in page_of(address), "the page shows the re-dispatch", timeout_s=30)
        if chapter != "killed":
            return
        for theme in THEMES:
            assert picture(address, pictures_folder(tmp_path) / f"status-{theme}.png", theme, height=2100) == []
        said = browse(address, tmp_path, "--virtual-time-budget=9000", "--dump-dom")
        assert console(said) == []
        assert "Pause</button>" in said
        text = page_of(address)
        assert "1 lost" in text
        assert "degraded" in text
        (tmp_path / "status.html").write_text(text, encoding="utf-8")
        for theme in THEMES if AXE is not None else ():
            found = rules_broken(text, tmp_path, theme)
            assert found["violations"] == []
            assert found["passes"] > 20
        raise EnoughSeenError

    with Processes(tmp_path) as processes, pytest.raises(EnoughSeenError):
        Story(processes, Teller(io.StringIO()), tmp_path).tell(after=look)
