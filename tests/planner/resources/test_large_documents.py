"""Large documents are read outside the event loop, which continues."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

from hetis.planner.threads import run_in_thread_gc_paused, stop_if_unwanted
from hetis.v1 import cluster_pb2
from hetis.v1 import cluster_service_pb2 as pb
from tests.planner.resources.served import document, served

_HEAD = "apiVersion: hetis/v1\nkind: Cluster\nname: fleet\nnetwork: {bandwidth: 100Gbps, latency: 20us}\nnodes:\n"


async def test_a_large_document_is_read_while_the_collector_of_garbage_rests(tmp_path: Path) -> None:
    """Garbage collections would block the loop for up to a second."""
    text = _HEAD + "".join(f"  - {{name: n{n}, gpus: [{{type: L4, count: 2}}]}}\n" for n in range(2000))
    collected = list[int]()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and threading.current_thread() is not threading.main_thread():
            collected.append(info["generation"])

    async with served(tmp_path) as planner:
        cluster = cluster_pb2.Cluster(document=document(text))
        request = pb.CreateClusterRequest(cluster_id="night", cluster=cluster, validate_only=True)
        gc.callbacks.append(note)
        try:
            await planner.clusters.CreateCluster(request)
        finally:
            gc.callbacks.remove(note)
    assert collected.count(1) + collected.count(2) <= 1
    assert gc.isenabled()


async def test_the_collector_works_again_when_the_last_work_has_ended() -> None:
    begun, ends = threading.Barrier(3), [threading.Event() for _ in range(2)]

    def work(end: threading.Event) -> None:
        begun.wait(10)
        end.wait(10)

    works = [asyncio.create_task(run_in_thread_gc_paused(work, end)) for end in ends]
    await asyncio.to_thread(begun.wait, 10)
    assert not gc.isenabled()
    ends[0].set()
    await works[0]
    assert not gc.isenabled()
    ends[1].set()
    await works[1]
    assert gc.isenabled()


async def test_work_whose_caller_has_gone_ends_or_never_begins() -> None:
    begun, ended = threading.Semaphore(0), threading.Semaphore(0)
    left_over = list[str]()

    def endless() -> None:
        begun.release()
        try:
            while True:
                stop_if_unwanted()
        finally:
            ended.release()

    works = [asyncio.create_task(run_in_thread_gc_paused(endless)) for _ in range(2)]
    waiting = asyncio.create_task(run_in_thread_gc_paused(left_over.append, "never"))
    for _ in works:
        await asyncio.to_thread(begun.acquire, timeout=10)
    for work in (waiting, *works):
        work.cancel()
    await asyncio.gather(waiting, *works, return_exceptions=True)
    for _ in works:
        assert await asyncio.to_thread(ended.acquire, timeout=10)
    await run_in_thread_gc_paused(left_over.append, "next")
    assert left_over == ["next"]
