"""A page in headless Chromium: no errors on its console, no rule of axe broken, pictures of it light and dark.

    HETIS_AXE=node_modules/axe-core/axe.min.js python -m pytest -m soak tests/planner/test_report_in_browser.py

axe-core comes from npm (`npm pack axe-core`). HETIS_SCREENSHOTS names a folder that keeps the pictures.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from html import unescape
from pathlib import Path

import pytest

from tests.planner.command_line import EXAMPLES, hetis_plan

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
AXE = os.environ.get("HETIS_AXE")
WIDTH = 1120
THEMES = {"light": "--blink-settings=preferredColorScheme=1", "dark": "--blink-settings=preferredColorScheme=0"}
# Puts what axe finds into the page, which Chromium then prints.
RUN_AXE = """
document.querySelectorAll("details").forEach((one) => { one.open = true; });
axe.run().then((found) => {
  const told = found.violations.map((one) => one.id + ": " + one.nodes.map((node) => node.html).slice(0, 3).join(" "));
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify({passes: found.passes.length, violations: told});
});
"""

pytestmark = [pytest.mark.soak, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan with attention workers, simulated."""
    folder = tmp_path_factory.mktemp("browser")
    problem = ("-c", str(EXAMPLES / "h100-l4.yaml"), "-m", "Llama-2-70B", "-w", "azure_conv_2023")
    placed = hetis_plan("place", *problem, "--time-limit", "20s", "--out", "plan.json", cwd=folder)
    assert placed.returncode == 0, placed.stderr
    reported = hetis_plan("report", "plan.json", "--simulate", "--out", "page.html", cwd=folder)
    assert reported.returncode == 0, reported.stderr
    return folder / "page.html"


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    profile = page.parent / "profile"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    command += [f"--user-data-dir={profile}", f"--window-size={WIDTH},1600", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page or the browser said about the page."""
    return re.findall(r".*CONSOLE.*", done.stderr)


@pytest.mark.parametrize("theme", THEMES)
def test_a_page_is_drawn_without_a_word_on_the_console(page: Path, theme: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("HETIS_SCREENSHOTS", tmp_path))
    picture = folder / f"report-{theme}.png"
    done = browse(page, THEMES[theme], "--hide-scrollbars", f"--screenshot={picture}")
    assert console(done) == []
    head = picture.read_bytes()[:24]
    assert struct.unpack(">II", head[16:]) == (WIDTH, 1600)


def test_errors_on_the_console_would_be_found(page: Path) -> None:
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("</body>", "<script>nothing.there()</script></body>"))
    assert console(browse(broken, "--dump-dom"))


@pytest.mark.skipif(AXE is None, reason="HETIS_AXE is not set")
@pytest.mark.parametrize("theme", THEMES)
def test_a_page_keeps_the_rules_of_axe(page: Path, theme: str) -> None:
    found = rules_broken(page, page.read_text(), theme)
    assert found["violations"] == []
    assert found["passes"] > 20


@pytest.mark.skipif(AXE is None, reason="HETIS_AXE is not set")
def test_broken_rules_would_be_found(page: Path) -> None:
    grey = page.read_text().replace("--ink: light-dark(#1a1d21", "--ink: light-dark(#dddddd")
    assert any("color-contrast" in one for one in rules_broken(page, grey, "light")["violations"])


def rules_broken(page: Path, html: str, theme: str) -> dict[str, list[str]]:
    assert AXE is not None
    checked = page.with_name("checked.html")
    script = Path(AXE).read_text(encoding="utf-8").replace("</script>", "<\\/script>")
    checked.write_text(html.replace("</body>", f"<script>{script}</script><script>{RUN_AXE}</script></body>"))
    done = browse(checked, THEMES[theme], "--virtual-time-budget=60000", "--dump-dom")
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stdout[-2000:]
    answer: dict[str, list[str]] = json.loads(unescape(match[1]))
    return answer
