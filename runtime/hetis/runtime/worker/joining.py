"""How an engine gets its attention workers: greets those that run, as devices of its stage."""

from __future__ import annotations

from hetis.runtime.kv.errors import DeviceLostError, UnreachedDeviceError
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.transport.connecting import ChannelKind, Endpoint, connect
from hetis.runtime.transport.errors import ChannelError
from hetis.runtime.worker.remote import RemoteDevice


def join(
    name: str,
    endpoint: Endpoint,
    shape: KvShape,
    *,
    epoch: int,
    kind: ChannelKind = ChannelKind.AUTO,
    timeout_s: float = 10.0,
    device: str = "cpu",
) -> RemoteDevice:
    """The worker at ``endpoint`` as a device with nothing in it; what it held for others is gone.

    Raises:
        UnreachedDeviceError: there is no connection; neither is there where this process may open no more files.
        DeviceLostError: it does not answer, or is another run than the endpoint is of.
        StaleEpochError: it obeys a later engine.
    """
    try:
        channel = connect(endpoint, kind, stall_s=timeout_s, device=device)
    except (ChannelError, OSError) as error:
        is_ours = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        raise (UnreachedDeviceError if is_ours else DeviceLostError)(name, str(error)) from error
    return RemoteDevice(name, shape, channel, epoch=epoch, key=endpoint.key, timeout_s=timeout_s)
