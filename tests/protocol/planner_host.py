"""A planner process in virtual time: the real fleet on the real store, which can be killed at any write."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.replica import Contents
from hetis.planner.store import Store, Transaction
from hetis.v1 import document_pb2, stage_pb2
from tests.planner.fleet.samples import (
    SETTINGS,
    cluster_document,
    cluster_record,
    plan_record,
    replica_record,
    shape,
)
from tests.protocol.clock import VirtualClock, VirtualLoop

T = TypeVar("T")
PRIMARY = "a"
WORKERS = ("b", "c")
NODES = (PRIMARY, *WORKERS)
BLOCKS = 120  # number of blocks of every device


def stage_model() -> stage_pb2.StageModel:
    """A primary with two attention workers; a copy of a gigabyte takes a tenth of a second."""
    piece = stage_pb2.AttentionPiece(head_s=1e-7, kv_byte_s=1e-12, call_s=1e-6)
    usual: dict[str, Any] = {"pieces": [piece], "link_byte_s": 1e-10, "total_blocks": BLOCKS, "high_water": 0.9}
    primary = stage_pb2.StageDevice(name="a/0", gpus=["a/0"], is_primary=True, **usual)
    others = [stage_pb2.StageDevice(name=f"{w}/0", gpus=[f"{w}/0"], transfer_s=1e-6, **usual) for w in WORKERS]
    heads = stage_pb2.HeadShape(
        head_groups=4, queries_per_group=4, kv_bytes_per_token=512, exchange_bytes_per_head=512, block_tokens=16
    )
    return stage_pb2.StageModel(stage=0, copy=0, num_layers=4, heads=heads, devices=[primary, *others])


class SampleStages:
    """Every replica of every plan has `stage_model`."""

    async def contents(self, plan: str, indices: Sequence[int]) -> list[Contents | None]:
        model = document_pb2.Document(content=b"{}")
        return [Contents(model=model, stages=(stage_model(),)) for _ in indices]


class MortalStore(Store):
    """The real store; a planner can die before or after one of its writes.

    Attributes:
        dies_at: number of future writes before the one at which it dies: 0 the next. None: it does not die.
        dies_after: whether that write is durable.
        died: called when it dies.
    """

    dies_at: int | None = None
    dies_after = False
    is_dead = False
    num_writes = 0
    died: Callable[[], None]

    async def write(self, work: Callable[[Transaction], T]) -> T:
        if self.is_dead:
            await asyncio.Event().wait()
        number, self.num_writes = self.num_writes, self.num_writes + 1
        if self.dies_at is None or number < self.dies_at:
            return await super().write(work)
        if self.dies_after:
            await super().write(work)
        self.is_dead = True
        self.died()
        await asyncio.Event().wait()
        raise AssertionError("a dead planner goes on")

    def lose_lock(self) -> None:
        """Always hold the lease: another planner may lead without this one knowing."""
        leadership = self.leadership
        if leadership._lock is not None:
            leadership._lock.release()
            leadership._lock = None  # otherwise it would be taken again

    def kill(self) -> None:
        self.is_dead = True
        self._connection.engine.dispose()
        self.lose_lock()
        self._connection.end_thread()


class PlannerHost:
    """One leadership term. ``died`` is called when it dies at a write."""

    def __init__(self, store: MortalStore, fleet: LiveFleet, epoch: int) -> None:
        self.store, self.fleet, self.epoch = store, fleet, epoch
        self.is_dead = False

    @classmethod
    async def start(cls, file: Path, loop: VirtualLoop, died: Callable[[], None]) -> PlannerHost:
        store = await MortalStore.open(f"sqlite:///{file}", clock=VirtualClock(loop).time)
        assert isinstance(store, MortalStore)
        store.died = died
        epoch = await store.leadership.grant("test")
        fleet = LiveFleet(
            store, Hubs(epoch), epoch=epoch, settings=SETTINGS, clock=VirtualClock(loop), plans=SampleStages()
        )
        await fleet.start()
        return cls(store, fleet, epoch)

    def kill(self) -> None:
        """Kill it as by -9: nothing is sent or written any more."""
        self.is_dead = True
        tasks = [*(reconciler.task for reconciler in self.fleet._reconcilers.values()), self.fleet._ticks]
        for task in tasks:
            if task is not None:
                task.cancel()
        self.store.kill()


@cache
def _template(folder: Path) -> Path:
    """Return a template of a store with an activated plan of one replica, made once."""
    file = folder / "template.db"

    async def make() -> None:
        store = await Store.open(f"sqlite:///{file}")
        await store.leadership.grant("the template")

        def fill(tx: Transaction) -> None:
            tx.clusters.insert(cluster_record(document=cluster_document(NODES)))
            tx.plans.insert(plan_record())
            tx.replicas.insert(replica_record(its=shape(workers=[f"{w}/0" for w in WORKERS])))

        await store.write(fill)
        await store.close()

    asyncio.run(make())
    return file


def new_store(template_folder: Path, folder: Path) -> Path:
    """Return a new file with the template's contents."""
    made = folder / "hetis.db"
    shutil.copyfile(_template(template_folder), made)
    return made
