"""Pages in headless Chromium: their console messages, pictures, and the rules of axe.

axe-core comes from npm (`npm pack axe-core`). HETIS_AXE names its ``axe.min.js``, HETIS_SCREENSHOTS a folder for
pictures.
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

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
AXE = os.environ.get("HETIS_AXE")
WIDTH = 1120
THEMES = {"light": "--blink-settings=preferredColorScheme=1", "dark": "--blink-settings=preferredColorScheme=0"}
# Puts axe's findings into the page, which Chromium then prints.
RUN_AXE = """
document.querySelectorAll("details").forEach((one) => { one.open = true; });
axe.run().then((found) => {
  const told = found.violations.map((one) => one.id + ": " + one.nodes.map((node) => node.html).slice(0, 3).join(" "));
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify({passes: found.passes.length, violations: told});
});
"""


def browse(address: str, folder: Path, *options: str, width: int = WIDTH, height: int = 1600) -> str:
    """Open an address; return what Chromium printed, including the console.

    ``folder`` has the browser's profile.
    """
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout + done.stderr


def console(said: str) -> list[str]:
    """Return the console messages from or about the page."""
    return re.findall(r".*CONSOLE.*", said)


def picture(address: str, path: Path, theme: str, *, width: int = WIDTH, height: int = 1600) -> list[str]:
    """Take a picture of a page; return the console messages meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = (THEMES[theme], "--hide-scrollbars", f"--screenshot={path}")
    said = browse(address, path.parent, *options, width=width, height=height)
    head = path.read_bytes()[:24]
    assert struct.unpack(">II", head[16:]) == (width, height)
    return console(said)


def pictures_folder(otherwise: Path) -> Path:
    """Return the folder for pictures."""
    return Path(os.environ.get("HETIS_SCREENSHOTS", otherwise))


def rules_broken(html: str, folder: Path, theme: str) -> dict[str, list[str]]:
    """Return axe's findings: ``violations``, and the number of passed rules."""
    assert AXE is not None
    checked = folder / "checked.html"
    script = Path(AXE).read_text(encoding="utf-8").replace("</script>", "<\\/script>")
    checked.write_text(html.replace("</body>", f"<script>{script}</script><script>{RUN_AXE}</script></body>"))
    said = browse(checked.as_uri(), folder, THEMES[theme], "--virtual-time-budget=60000", "--dump-dom")
    match = re.search(r'<pre id="found">(.*?)</pre>', said, re.DOTALL)
    assert match is not None, said[-2000:]
    answer: dict[str, list[str]] = json.loads(unescape(match[1]))
    return answer
