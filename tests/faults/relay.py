"""Forwards connections, also between network namespaces, since Unix sockets belong to the file system.

python -m tests.faults.relay FROM TO        # each HOST:PORT or unix:PATH
"""

from __future__ import annotations

import asyncio
import contextlib
import sys


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def relay(source: str, target: str) -> None:
    """Forward connections until cancelled."""

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if target.startswith("unix:"):
                far = await asyncio.open_unix_connection(target.removeprefix("unix:"))
            else:
                host, _, port = target.rpartition(":")
                far = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pour(reader, far[1]), _pour(far[0], writer))

    if source.startswith("unix:"):
        server: asyncio.Server = await asyncio.start_unix_server(accepted, source.removeprefix("unix:"))
    else:
        host, _, port = source.rpartition(":")
        server = await asyncio.start_server(accepted, host, int(port))
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(relay(*sys.argv[1:]))
