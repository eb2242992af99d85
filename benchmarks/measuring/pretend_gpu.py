"""A GPU that is not there: its tensors lie in CPU memory, and what the host would wait for is counted.

Its device is torch's ``meta``, the only one besides the CPU whose tensors torch handles everywhere. A copy between host
and device makes the host wait unless it is queued (``non_blocking``) and the host's side is pinned; reading a number
from the device, and whatever has a size that only the device knows, always does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default}


class DeviceTensor(torch.Tensor):  # type: ignore[misc]
    """A tensor of the device, whose numbers are in ``inner``."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the mode that counts")


class PretendGpu(TorchDispatchMode):  # type: ignore[misc]
    """While it is entered, counts what the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0  # transfers that the host waits for
        self.queued = 0  # transfers that it does not wait for
        self._pinned: set[int] = set()

    def put(self, value: Any) -> Any:
        """Return tensors as the device's; everything else, and what is there already, as it is."""
        return DeviceTensor(value) if isinstance(value, torch.Tensor) and not is_there(value) else value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func._can_decompose():  # in inference mode torch passes on what is made of other operations
            with self:
                return func.decompose(*args, **kwargs)
        there = any(map(is_there, tree_leaves((args, kwargs))))
        device = kwargs.get("device")
        pinned = kwargs.pop("pin_memory", False)
        if device is not None and torch.device(device) == DEVICE:
            kwargs["device"] = torch.device("cpu")
        self._count(func, args, kwargs, device)
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if pinned:
            self._pinned.add(found.untyped_storage().data_ptr())
        if func is _aten.copy_.default or (func not in _READS and func._schema.name.endswith("_")):
            return args[0]
        lands = torch.device(device) == DEVICE if device is not None else there
        return tree_map(self.put, found) if lands else found

    def _count(self, func: Any, args: Any, kwargs: Any, device: Any) -> None:
        if func in _READS or (func is _aten.index.Tensor and any(_is_mask(one) for one in args[1])):
            self.waits += any(map(is_there, tree_leaves(args)))
        elif func is _aten._to_copy.default and device is not None:
            is_down = is_there(args[0])
            if is_down != (torch.device(device) == DEVICE):
                # On its way down a new tensor takes it, which is not pinned.
                self._transfer(is_queued=kwargs.get("non_blocking", False) and not is_down and self._is_pinned(args[0]))
        elif func is _aten.copy_.default and is_there(args[0]) != is_there(args[1]):
            host = args[1] if is_there(args[0]) else args[0]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self._transfer(is_queued=non_blocking and self._is_pinned(host))

    def _transfer(self, *, is_queued: bool) -> None:
        self.queued += is_queued
        self.waits += not is_queued

    def _is_pinned(self, host: torch.Tensor) -> bool:
        return host.untyped_storage().data_ptr() in self._pinned


def is_there(value: Any) -> bool:
    """Return whether a value is a tensor of the device."""
    return isinstance(value, DeviceTensor)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)
