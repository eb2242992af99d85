"""Files that a verb saves: refused early where they cannot be written, written whole, read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from hetis.formats.documents import Value, dump
from hetis.formats.errors import single_problem
from hetis.formats.files import write_atomically


def refuse_unwritable(path: Path) -> None:
    """Says before a long solve what would go wrong after it.

    Raises:
        DocumentError: the folder is missing or may not be written, or the path is a folder.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise single_problem(str(path), "cannot be written: is a folder")
    if not folder.is_dir():
        raise single_problem(str(path), f"cannot be written: no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise single_problem(str(path), f"cannot be written: permission denied in {folder}")


def save(value: Value, path: Path) -> None:
    """Writes the whole document or nothing; YAML where the name says so.

    Raises:
        DocumentError: the file cannot be written.
    """
    form: Literal["yaml", "json"] = "yaml" if path.suffix in (".yaml", ".yml") else "json"
    write_atomically(path, dump(value, form))
