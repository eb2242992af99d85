"""Where a verb writes: now `hetis.formats.command_line.terminal`. This name goes once nothing imports it."""

from hetis.formats.command_line.terminal import OutputFormat, Terminal

__all__ = ["OutputFormat", "Terminal"]
