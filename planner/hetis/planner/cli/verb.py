"""What every verb shares: now `hetis.formats.command_line.verb`. This name goes once nothing imports it."""

from hetis.formats.command_line.verb import verb

__all__ = ["verb"]
