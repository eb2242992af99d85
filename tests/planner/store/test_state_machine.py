"""The store against a dictionary, with crashes: completed writes are there, failed ones are not."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hetis.planner.failures import ServiceError
from hetis.planner.store import ClusterRecord, Store, Transaction
from tests.planner.store import samples

T = TypeVar("T")
NAMES = st.sampled_from([f"clusters/{letter}" for letter in "abc"])


class Interrupted(Exception):  # noqa: N818
    """The work of a transaction stops halfway."""


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="hetis-store-"))
        self.model: dict[str, ClusterRecord] = {}
        self.versions: dict[str, int] = {}  # the highest version that each name has had
        self.answers: dict[str, bytes] = {}
        self.epoch = 0
        self.number = 0
        self.open()

    def open(self) -> None:
        self.store = self.wait(Store.open(f"sqlite:///{self.folder}/{self.number}.db"))
        epoch = self.wait(self.store.leadership.grant("test"))
        assert epoch == self.epoch + 1
        self.epoch = epoch

    def wait(self, work: object) -> T:  # type: ignore[type-var, misc]
        return self.loop.run_until_complete(work)  # type: ignore[call-overload, no-any-return]

    def note(self, record: ClusterRecord) -> None:
        self.model[record.name] = record
        self.versions[record.name] = record.version

    def write(self, work: Callable[[Transaction], T]) -> T:
        return self.wait(self.store.write(work))

    @rule(name=NAMES, text=st.binary(max_size=20), fails=st.booleans())
    def insert(self, name: str, text: bytes, fails: bool) -> None:
        record = samples.cluster(name, text=text)

        def work(tx: Transaction) -> ClusterRecord:
            made = tx.clusters.insert(record)
            if fails:
                raise Interrupted
            return made

        try:
            made = self.write(work)
        except ServiceError as error:
            assert error.reason_name == "ALREADY_EXISTS"  # noqa: PT017
            assert name in self.model
        except Interrupted:
            assert name not in self.model
        else:
            assert name not in self.model
            assert not fails
            assert made == dataclasses.replace(record, version=made.version)
            assert made.version > self.versions.get(name, 0), "an etag that the name had before"
            self.note(made)

    @rule(name=NAMES, text=st.binary(max_size=20), is_stale=st.booleans(), fails=st.booleans())
    def update(self, name: str, text: bytes, is_stale: bool, fails: bool) -> None:
        if name not in self.model:
            return
        present = self.model[name]
        body = samples.cluster(name, text=text).body
        wanted = dataclasses.replace(present, body=body, version=present.version - is_stale)

        def work(tx: Transaction) -> ClusterRecord:
            newer = tx.clusters.update(wanted)
            if fails:
                raise Interrupted
            return newer

        try:
            newer = self.write(work)
        except ServiceError as error:
            assert error.reason_name == "ETAG_MISMATCH"  # noqa: PT017
            assert is_stale
        except Interrupted:
            assert fails
        else:
            assert newer.version == present.version + 1
            self.note(newer)

    @rule(names=st.sets(NAMES, min_size=1))
    def delete_together(self, names: set[str]) -> None:
        def work(tx: Transaction) -> None:
            for name in sorted(names):
                tx.clusters.delete(name)

        try:
            self.write(work)
        except ServiceError:
            assert not names <= self.model.keys()
        else:
            for name in names:
                del self.model[name]

    @rule(request_id=st.sampled_from("xy"), answer=st.binary(min_size=1, max_size=5))
    def ask_once(self, request_id: str, answer: bytes) -> None:
        def work(tx: Transaction) -> bytes:
            earlier = tx.requests.replay("/m", request_id, "print")
            if earlier is None:
                tx.requests.remember("/m", request_id, "print", answer)
            return earlier or answer

        assert self.write(work) == self.answers.setdefault(request_id, answer)

    @rule()
    def restart(self) -> None:
        self.wait(self.store.close())
        self.open()

    @rule()
    @precondition(lambda self: self.model)
    def crash(self) -> None:
        """Continue from the present files while the store is open, as after kill -9."""
        before, self.number = self.number, self.number + 1
        for path in self.folder.glob(f"{before}.db*"):
            if not path.name.endswith(".lock"):
                shutil.copy(path, self.folder / path.name.replace(f"{before}.db", f"{self.number}.db"))
        self.wait(self.store.close())
        self.open()

    @invariant()
    def everything_acknowledged_is_there_and_nothing_else(self) -> None:
        found: list[ClusterRecord] = self.wait(self.store.read(lambda tx: tx.clusters.all()))
        assert {record.name: record for record in found} == self.model
        assert [record.name for record in found] == sorted(self.model)

    def teardown(self) -> None:
        self.wait(self.store.close())
        self.loop.close()
        shutil.rmtree(self.folder)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=25)
