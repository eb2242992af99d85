"""Binary files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hetis.formats.errors import single_problem


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """A temporary file in the same folder, renamed over ``path``.

    Raises:
        DocumentError: the folder does not exist or cannot be written.
    """
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise single_problem(str(path), f"cannot be written: {error.strerror}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
