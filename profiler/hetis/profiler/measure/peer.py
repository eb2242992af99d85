"""One of two processes that exchange messages: ``python -m hetis.profiler.measure.peer RANK STORE DEVICE``.

Rank 0 reads one request per line from standard input (``{"op": "transfer", "num_bytes": 4096, "count": 10}``), passes
it to rank 1, carries it out together with it, and prints the seconds that ``count`` of them took. The end of input ends
both.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist

OPS = ("end", "transfer", "all_reduce")


def main(arguments: list[str]) -> None:
    from datetime import timedelta

    rank, store, device = int(arguments[0]), arguments[1], torch.device(arguments[2])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    # Rank 1 waits for a request as long as rank 0's caller takes.
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(hours=24),
        device_id=device if device.type == "cuda" else None,  # so that NCCL need not guess the GPUs
    )
    try:
        if rank == 0:
            print(json.dumps({"ready": True}), flush=True)
            for line in sys.stdin:
                request = json.loads(line)
                wanted = [OPS.index(request["op"]), request["num_bytes"], request["count"]]
                print(json.dumps({"seconds": _do(wanted, rank, device)}), flush=True)
            _do([0, 0, 0], rank, device)
        else:
            while _do([0, 0, 0], rank, device) >= 0:
                pass
    finally:
        dist.destroy_process_group()


def _do(wanted: list[int], rank: int, device: torch.device) -> float:
    """Do one request, which rank 1 learns from rank 0, and return its seconds, or -1 if it was to end."""
    header = torch.tensor(wanted, dtype=torch.int64, device=device)
    dist.broadcast(header, src=0)
    op, num_bytes, count = (int(value) for value in header)
    if op == 0:
        return -1.0
    message = torch.ones(max(1, num_bytes // 2), dtype=torch.bfloat16, device=device)
    dist.barrier()
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        if OPS[op] == "all_reduce":
            dist.all_reduce(message)
        else:
            _ping_pong(message, rank)
    _synchronize(device)
    seconds = time.perf_counter() - start
    return seconds if OPS[op] == "all_reduce" else seconds / 2  # a round trip


def _ping_pong(message: torch.Tensor, rank: int) -> None:
    if rank == 0:
        dist.send(message, dst=1)
        dist.recv(message, src=1)
    else:
        dist.recv(message, src=0)
        dist.send(message, dst=0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1:])
