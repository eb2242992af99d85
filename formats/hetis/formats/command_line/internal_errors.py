"""Wording of internal errors: an unexpected exception ends in one message, with what is needed to report it."""

from __future__ import annotations

import traceback

REPORT_IT = "This is a bug in hetis. HETIS_DEBUG=1 shows the traceback; please report it with the input files."


def internal_error(error: Exception) -> tuple[str, list[str]]:
    """Return the headline, with the line of code that raised the error, and the lines below it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"internal error: {type(error).__name__}: {error}{where}", [REPORT_IT]
