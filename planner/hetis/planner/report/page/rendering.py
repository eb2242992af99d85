"""A page as one file of HTML, including style and script, with nothing to fetch."""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

from hetis.planner.report.blocks import Page

if TYPE_CHECKING:
    from jinja2 import Template

PACKAGE = "hetis.planner.report.page"


def render_page(page: Page) -> str:
    """Return the whole file. Raises ModuleNotFoundError if jinja2 is not installed."""
    return _template().render(page=page, css=_text("page.css"), script=_script(page.is_live))


def live_script_policy() -> str:
    """Return the script source for a live page's content security policy: the page's script and no other."""
    digest = sha256(_script(True).encode()).digest()
    return f"'sha256-{b64encode(digest).decode()}'"


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_text("page.html.j2"))


def _script(is_live: bool) -> str:
    return _text("page.js") + (_text("live.js") if is_live else "")


@cache
def _text(name: str) -> str:
    return files(PACKAGE).joinpath(name).read_text(encoding="utf-8")
