"""Joins attention workers that run already, as devices of an engine's stage.

`join_at` is all that an engine needs of this package:

    device = join_at("w0", "10.0.0.2", 7070, key, shape, epoch=time.time_ns())
    device.num_pages                                      # each of shape.page_bytes, for one virtual sequence
    device.begin(DeviceStep(epoch=e, number=n, requests=[...], incarnations=[...], heads=[...],
                            positions=first, counts=counts))    # [N]; counts None: one position each
    pending = device.attend(layer, qkv)                   # [T, r + 2, d], rows in the step's order; returns at once
    out = pending.wait()                                  # [T, r, d]; wait for one layer before requesting the next
    device.finish(n)                                      # or abort(n): the same positions may begin again
    device.drop([SequenceKey(request, incarnation, head)])    # frees pages; `adopt`, `export`, `digest` move KV
    device.stats()                                        # between steps: free pages, sequences, attention's work
    device.close()

A worker serves one connection, that with the newest epoch. An engine that connects with the same or a higher epoch
takes over, and finds the worker empty; one with a lower epoch is refused. A restarting engine therefore needs an epoch
that only grows, such as the time. `begin` has no answer: `wait` raises OutOfPagesError for too few pages and
UnknownSequenceError for an unknown sequence, after which `abort` restores the device but for the pages already
allocated. Every other failure is a DeviceLostError, and everything on the device is gone: join again. Nothing here is
thread-safe.
"""

from __future__ import annotations

from hetis.runtime.kv.errors import DeviceLostError, UnreachedDeviceError
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.transport.connecting import ChannelKind, WorkerEndpoint, connect
from hetis.runtime.transport.errors import ChannelError
from hetis.runtime.worker.remote import RemoteDevice


def join_at(
    name: str,
    host: str,
    port: int,
    key: bytes,
    shape: KvShape,
    *,
    epoch: int,
    kind: ChannelKind = ChannelKind.AUTO,
    timeout_s: float = 10.0,
) -> RemoteDevice:
    """Return the worker that listens at ``host``, ``port`` as an empty device. What it held for others is gone.

    Args:
        name: for messages.
        host, port: as given to `hetis-worker --listen`, or in its port file.
        key: of the worker, from `hetis.runtime.transport.keys.read_key`.
        shape: of the virtual sequences; the worker reallocates its pages if it differs from the previous one.
        epoch: of the engine.
        kind: of channel; ``AUTO`` is shared memory on one host and TCP between hosts.
        timeout_s: a worker that owes an answer for this long is lost.

    Raises:
        UnreachedDeviceError: there is no connection, or this process has no free file descriptors for one.
        DeviceLostError: it does not answer, has no memory for this KV, or has another key.
        StaleEpochError: it obeys a later engine.
    """
    return join(name, WorkerEndpoint(host=host, port=port, key=key), shape, epoch=epoch, kind=kind, timeout_s=timeout_s)


def join(
    name: str,
    endpoint: WorkerEndpoint,
    shape: KvShape,
    *,
    epoch: int,
    kind: ChannelKind = ChannelKind.AUTO,
    timeout_s: float = 10.0,
) -> RemoteDevice:
    """Do the same as `join_at`, with address and key in one value."""
    try:
        channel = connect(endpoint, kind, stall_s=timeout_s)
    except (ChannelError, OSError) as error:
        is_ours = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        raise (UnreachedDeviceError if is_ours else DeviceLostError)(name, str(error)) from error
    return RemoteDevice(name, shape, channel, epoch=epoch, key=endpoint.key, timeout_s=timeout_s)
