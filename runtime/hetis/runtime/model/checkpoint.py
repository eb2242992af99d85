"""Weights in safetensors files: only what is asked for is read."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from hetis.runtime.model.errors import ModelError


class Checkpoint:
    """The tensors of a model folder, by name; a context manager, since files stay open.

    Attributes:
        folder: where they are.
        bytes_read: so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._file_of = self._index()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> torch.Tensor:
        """The tensor ``name`` of ``shape`` in the file, or the rows or columns of it, as ``dtype``.

        Raises:
            ModelError: there is none, or of another shape.
        """
        if name not in self._file_of:
            raise ModelError(f"{self.folder}: no tensor {name}")
        piece = self._file(self._file_of[name]).get_slice(name)
        found = tuple(piece.get_shape())
        if found != shape:
            raise ModelError(f"{self.folder}: {name} has shape {list(found)}, must be {list(shape)} by config.json")
        rows = rows or slice(None)
        tensor = piece[rows] if columns is None else piece[rows, columns]
        self.bytes_read += tensor.nbytes
        if not tensor.is_floating_point():
            raise ModelError(f"{self.folder}: {name} is of type {tensor.dtype}, quantised weights are not supported")
        result: torch.Tensor = tensor.to(dtype)
        return result

    def _index(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError):
                raise ModelError(f"{index}: no weight_map") from None
            return dict(found)
        if (self.folder / "model.safetensors").is_file():
            return dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        raise ModelError(f"{self.folder}: neither model.safetensors nor model.safetensors.index.json is there")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            from safetensors import SafetensorError, safe_open

            try:
                self._open[name] = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{self.folder / name}: {error}") from None
        return self._open[name]
