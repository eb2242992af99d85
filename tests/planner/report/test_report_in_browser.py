"""A page in headless Chromium: no console errors, no violations of axe's rules, and pictures in light and dark.

HETIS_AXE=node_modules/axe-core/axe.min.js python -m pytest -m soak tests/planner/report/test_report_in_browser.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planner.browser import AXE, CHROMIUM, THEMES, browse, console, picture, pictures_folder, rules_broken
from tests.planner.command_line import EXAMPLES, hetis_plan

pytestmark = [pytest.mark.soak, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan with attention workers, simulated."""
    folder = tmp_path_factory.mktemp("browser")
    problem = ("-c", str(EXAMPLES / "h100-l4.yaml"), "-m", "Llama-2-70B", "-w", "azure_conv_2023")
    placed = hetis_plan("place", *problem, "--out", "plan.json", cwd=folder)
    assert placed.returncode == 0, placed.stderr
    reported = hetis_plan("report", "plan.json", "--simulate", "--out", "page.html", cwd=folder)
    assert reported.returncode == 0, reported.stderr
    return folder / "page.html"


@pytest.mark.parametrize("theme", THEMES)
def test_a_page_is_drawn_without_a_word_on_the_console(page: Path, theme: str, tmp_path: Path) -> None:
    path = pictures_folder(tmp_path) / f"report-{theme}.png"
    assert picture(page.as_uri(), path, theme, height=1760) == []  # down to the curves


def test_errors_on_the_console_would_be_found(page: Path) -> None:
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("</body>", "<script>nothing.there()</script></body>"))
    assert console(browse(broken.as_uri(), page.parent, "--dump-dom"))


@pytest.mark.skipif(AXE is None, reason="HETIS_AXE is not set")
@pytest.mark.parametrize("theme", THEMES)
def test_a_page_keeps_the_rules_of_axe(page: Path, theme: str) -> None:
    found = rules_broken(page.read_text(), page.parent, theme)
    assert found["violations"] == []
    assert found["passes"] > 20


@pytest.mark.skipif(AXE is None, reason="HETIS_AXE is not set")
def test_broken_rules_would_be_found(page: Path) -> None:
    grey = page.read_text().replace("--ink: light-dark(#1a1d21", "--ink: light-dark(#dddddd")
    assert any("color-contrast" in one for one in rules_broken(grey, page.parent, "light")["violations"])
