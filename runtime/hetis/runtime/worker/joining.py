"""How an engine gets its attention workers: greets those that run, as devices of its stage.

`join_at` is all that an engine needs of this package:

    device = join_at("w0", "10.0.0.2", 7070, key, shape, epoch=time.time_ns())
    device.num_pages                                      # each of shape.page_bytes, for one virtual sequence
    device.begin(DeviceStep(epoch=e, number=n, requests=[...], incarnations=[...], heads=[...],
                            positions=first, counts=counts))    # [N]; counts None: one position each
    pending = device.attend(layer, qkv)                   # [T, r + 2, d], rows in the step's order; returns at once
    out = pending.wait()                                  # [T, r, d]; wait for one layer before the next is asked for
    device.finish(n)                                      # or abort(n): the same positions may be begun again
    device.drop([SequenceKey(request, incarnation, head)])    # frees pages; `adopt`, `export`, `digest` move KV
    device.stats()                                        # between steps: free pages, sequences, what attention took
    device.close()

A worker serves one connection, of the newest epoch that it was greeted with: who comes with a higher one, or the same,
takes over, and finds it empty; who comes with a lower one is refused. An engine that starts again therefore needs an
epoch that only grows, as the time does. `begin` takes no answer: too few pages (OutOfPagesError) or an unknown sequence
(UnknownSequenceError) is raised by `wait`, after which `abort` makes the device as it was but for the pages that were
taken. Every other failure is a DeviceLostError, and all that was there is gone: join again. Nothing here is to be
shared between threads.
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
    """The worker that listens at ``host``, ``port``, as a device with nothing in it; what it held for others is gone.

    Args:
        name: for messages.
        host, port: as `hetis-worker --listen` says, or its port file.
        key: of the worker, from `hetis.runtime.transport.keys.read_key`.
        shape: of the virtual sequences; the worker takes its pages anew where it differs from the last one's.
        epoch: of the engine.
        kind: of channel; ``AUTO`` is shared memory on one host and TCP between hosts.
        timeout_s: a worker that owes an answer for so long is lost.

    Raises:
        UnreachedDeviceError: there is no connection; neither is there where this process may open no more files.
        DeviceLostError: it does not answer, has no memory for such KV, or its key is another.
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
    """`join_at`, where address and key are one value."""
    try:
        channel = connect(endpoint, kind, stall_s=timeout_s)
    except (ChannelError, OSError) as error:
        is_ours = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        raise (UnreachedDeviceError if is_ours else DeviceLostError)(name, str(error)) from error
    return RemoteDevice(name, shape, channel, epoch=epoch, key=endpoint.key, timeout_s=timeout_s)
