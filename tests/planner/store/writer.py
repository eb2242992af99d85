"""A planner that only writes: ``python -m tests.planner.store.writer URL``. Prints every acknowledged write."""

from __future__ import annotations

import asyncio
import itertools
import sys

from hetis.planner.store import Store, Transaction
from tests.planner.store import samples


async def write_for_ever(url: str) -> None:
    store = await Store.open(url)
    await store.leadership.grant("writer")
    first = len(await store.read(lambda tx: tx.clusters.all()))
    for number in itertools.count(first):

        def both(tx: Transaction, number: int = number) -> None:
            tx.clusters.insert(samples.cluster(f"clusters/{number:06}"))
            tx.plan_documents.put(f"clusters/{number:06}", b"x" * 10_000)

        await store.write(both)
        print(number, flush=True)


if __name__ == "__main__":
    asyncio.run(write_for_ever(sys.argv[1]))
