"""A store in memory, with the tables and the fence of the real one: fast enough for thousands of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from hetis.planner import failures
from hetis.planner.failures import Reason, ServiceError

T = TypeVar("T")


class Table:
    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.num_read = 0  # records in the results of `all`

    def get(self, name: str) -> Any:
        return self.rows.get(name)

    def require(self, name: str) -> Any:
        if name not in self.rows:
            raise failures.not_found(name)
        return self.rows[name]

    def insert(self, record: Any) -> Any:
        if record.name in self.rows:
            raise ServiceError(Reason.ERROR_REASON_ALREADY_EXISTS, f"{record.name} exists already")
        self.rows[record.name] = record
        return record

    def update(self, record: Any) -> Any:
        present = self.require(record.name)
        assert present.version == record.version, "read in another transaction"
        self.rows[record.name] = replace(record, version=record.version + 1)
        return self.rows[record.name]

    def delete(self, name: str) -> None:
        self.require(name)
        del self.rows[name]

    def all(self, **filters: Any) -> list[Any]:
        found = self._fitting(filters)
        self.num_read += len(found)
        return found

    def _fitting(self, filters: dict[str, Any]) -> list[Any]:
        def fits(record: Any) -> bool:
            return all(
                getattr(record, field) in wanted
                if not isinstance(wanted, str | int)
                else getattr(record, field) == wanted
                for field, wanted in filters.items()
            )

        return [record for _, record in sorted(self.rows.items()) if fits(record)]

    def versions(self, **filters: Any) -> dict[str, int]:
        return {record.name: record.version for record in self._fitting(filters)}


class Tables:
    def __init__(self) -> None:
        self.clusters, self.nodes, self.plans = Table(), Table(), Table()
        self.replicas, self.redispatches = Table(), Table()
        self.plan_documents: dict[str, bytes] = {}


class MemoryStore:
    """The store of the planner that leads with ``epoch``. `write_as` acts for another epoch, which must do nothing."""

    def __init__(self) -> None:
        self.tables = Tables()
        self.epoch = 1

    def write_as(self, epoch: int, work: Callable[[Any], T]) -> T:
        if epoch != self.epoch:
            raise ServiceError(Reason.ERROR_REASON_NOT_LEADER, f"epoch {self.epoch} leads")
        return work(self.tables)

    async def read(self, work: Callable[[Any], T]) -> T:
        return work(self.tables)

    async def get(self, kind: Any, name: str) -> Any:
        return await self.read(lambda tables: getattr(tables, kind.table.name).get(name))

    async def require(self, kind: Any, name: str) -> Any:
        return await self.read(lambda tables: getattr(tables, kind.table.name).require(name))

    async def write(self, work: Callable[[Any], T]) -> T:
        return self.write_as(self.epoch, work)
