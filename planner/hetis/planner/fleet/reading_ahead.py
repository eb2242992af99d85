"""What a standby reads of the store, so that its next term begins with documents that are parsed already."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.stored_plans import StoredPlans
from hetis.planner.store import ClusterRecord, Reader, Store

_PAUSE_S = 10.0
_AT_ONCE = 200  # clusters in one query; databases limit the parameters of a statement
_log = logging.getLogger("hetis.planner.fleet")


class ReadAhead:
    """Keeps the documents of all clusters and of their active plans parsed. It decides nothing and keeps no record."""

    def __init__(self, store: Store, declared: DeclaredFleets, plans: StoredPlans) -> None:
        self._store, self._declared, self._plans = store, declared, plans
        self._read: dict[str, int] = {}  # versions of the clusters whose documents were read, by name

    async def run(self) -> None:
        """Read what is new until cancelled."""
        while True:
            try:
                await self.step()
            except ServiceError as error:  # the store is away, or another version wrote it: a term would say so, too
                _log.info("documents were not read ahead", extra={"why": str(error)})
            await asyncio.sleep(_PAUSE_S)

    async def step(self) -> None:
        """Read the documents of clusters that have changed since the last step. Raises ServiceError."""
        there = await self._store.read(lambda reader: reader.clusters.versions())
        new = [name for name, version in there.items() if self._read.get(name) != version]
        for first in range(0, len(new), _AT_ONCE):
            found = await self._store.read(partial(_clusters, names=new[first : first + _AT_ONCE]))
            await self._declared.read(found)
            for cluster in found:
                if cluster.active_plan:
                    await self._plans.read_ahead(cluster.active_plan)
                self._read[cluster.name] = cluster.version
        self._read = {name: version for name, version in self._read.items() if name in there}


def _clusters(reader: Reader, names: list[str]) -> list[ClusterRecord]:
    return list(reader.clusters.all(name=names))
