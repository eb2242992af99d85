"""Simulated GPUs: tensors that report ``cuda:N`` as their device, and are computed in this machine's memory.

Within `FakeGpus` torch makes them wherever ``device="cuda:N"`` is requested. As on real GPUs, an operation over tensors
of two devices raises, and so does numpy's view of one. Results are real, so that whole engines can run. What is not
found here: kernels that differ on GPUs, and calls that return before they are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
# Operations whose arguments may be on another device: as indices, or as values that are copied into place.
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_READING = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__bool__}


class GpuTensor(torch.Tensor):
    """A tensor on a simulated GPU; ``where`` is its device."""

    where: torch.device

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} outside of FakeGpus")


class FakeGpus(TorchFunctionMode):
    """A context in which this many GPUs exist.

    Attributes:
        to_gpus: number of copies from the CPU's memory to a GPU's so far.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.to_gpus = count, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(_tensors((args, kwargs)))
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return _where(args[0])
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return _where(args[0]).type == "cuda"
        if func is torch.Tensor.numpy and _where(args[0]) != _CPU:
            raise TypeError("can't convert cuda device type tensor to numpy")
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        if func is torch.Tensor.cpu:
            return self._to((args[0], _CPU), {})
        asked = kwargs.pop("device", None)
        where = torch.device(asked) if asked is not None else self._common(func, args, tensors)
        return self._put(func(*_plain(args), **_plain(kwargs)), self._checked(where))

    def _to(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, target = args[0], _where(args[0])
        rest = []
        for wish in (*args[1:], kwargs.pop("device", None)):
            if isinstance(wish, torch.Tensor):
                target = _where(wish)
                rest.append(_plain(wish).dtype)
            elif isinstance(wish, str | torch.device):
                target = self._checked(torch.device(wish))
            elif wish is not None:
                rest.append(wish)
        plain = _plain(tensor)
        found = plain.to(*rest, **kwargs) if rest or kwargs else plain
        if target == _where(tensor):
            return tensor if found is plain else self._put(found, target)
        self.to_gpus += _where(tensor) == _CPU
        return self._put(found.clone(), target)

    def _common(self, func: Callable[..., Any], args: tuple[Any, ...], tensors: list[torch.Tensor]) -> torch.device:
        if func in _INDEXING:
            given = args[0], *(value for value in args[2:] if isinstance(value, torch.Tensor))
        else:
            given = tuple(tensors)
        found = {_where(tensor) for tensor in given}
        scalars = {_where(tensor) for tensor in given if not _plain(tensor).dim() and func not in _INDEXING}
        found = found - ({_CPU} & scalars) or found
        if len(found) > 1:
            raise RuntimeError(f"{func}: tensors on {sorted(map(str, found))}")
        return found.pop() if found and func not in _READING else _CPU

    def _checked(self, where: torch.device) -> torch.device:
        if where.type == "cuda" and not (where.index is not None and where.index < self.count):
            raise RuntimeError(f"{where} is not there")
        return where

    def _put(self, value: Any, where: torch.device) -> Any:
        if where == _CPU:
            return value
        if isinstance(value, torch.Tensor):
            with torch._C.DisableTorchFunctionSubclass():
                found = value.as_subclass(GpuTensor)
            found.where = where
            return found
        if isinstance(value, tuple | list) and any(isinstance(x, torch.Tensor) for x in value):
            return (
                type(value)([self._put(x, where) for x in value])
                if type(value) in (tuple, list)
                else tuple(self._put(x, where) for x in value)
            )
        return value


def _where(tensor: torch.Tensor) -> torch.device:
    return tensor.where if isinstance(tensor, GpuTensor) else _CPU


def _plain(value: Any) -> Any:
    if isinstance(value, GpuTensor):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(torch.Tensor)
    if type(value) in (tuple, list):
        return type(value)(_plain(x) for x in value)
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
