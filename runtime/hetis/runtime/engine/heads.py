"""The heads that live on one stage: the book of where each of them is, and what the stage's devices are told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.engine.group import Split
from hetis.runtime.engine.part import PipelineStage
from hetis.runtime.engine.placement import HeadMove, Placement, even_costs
from hetis.runtime.engine.prompts import PromptBook
from hetis.runtime.engine.request import Request
from hetis.runtime.engine.step import Step
from hetis.runtime.kv.errors import DeviceLostError
from hetis.runtime.kv.shape import SequenceKey
from hetis.solver.dispatch.problem import HeadShape
from hetis.solver.dispatch.problem import Stage as StageCosts
from hetis.solver.dispatch.snapshot import DeviceStatus

T = TypeVar("T")


class StageHeads:
    """One stage (or one copy of it) with its book.

    Where stages overlap, all that the stage is asked goes through a thread of its own, one thing after the other.

    Attributes:
        number: its place among the engine's stages; `Request.heads` and `HeadMove.stage` speak of it.
        stage: layers and devices.
        placement: the book, ahead of the devices.
        prompts: KV of prompts under way, on the primary.
        lost: devices that failed where nothing could be done about it.
    """

    def __init__(self, number: int, stage: PipelineStage, costs: StageCosts | None, *, overlaps: bool = False) -> None:
        """``costs`` are of attention on the stage's devices, in their order; None: all of one speed."""
        self.number, self.stage = number, stage
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"stage-{number}") if overlaps else None
        shape = stage.shape
        heads = HeadShape(
            head_groups=len(stage.homes),
            queries_per_group=shape.queries_per_group,
            kv_bytes_per_token=2 * shape.head_dim * shape.item_bytes,
            exchange_bytes_per_head=shape.head_dim * shape.item_bytes * (2 + 2 / shape.queries_per_group),
            block_tokens=shape.page_tokens,
        )
        costs = costs or even_costs(heads, [device.name for device in stage.devices], primaries=stage.num_ranks)
        pages = [device.num_pages for device in stage.devices]
        self.placement = Placement(costs, pages, stage=number, homes=stage.homes)
        self.prompts = PromptBook()
        self.lost: set[int] = set()
        self._failed: BaseException | None = None  # why KV from elsewhere is not where it should be

    @property
    def token_bytes(self) -> int:
        """KV of one position: all heads and layers of the stage."""
        shape = self.stage.shape
        return shape.page_bytes // shape.page_tokens * len(self.stage.homes)

    @property
    def num_devices(self) -> int:
        return len(self.stage.devices)

    def device(self, error: DeviceLostError) -> int:
        """Index of the device that an error is about."""
        return next(i for i, device in enumerate(self.stage.devices) if device.name == error.device)

    def close(self) -> None:
        """The engine has ended."""
        if self._thread is not None:
            self._thread.shutdown()
        self.stage.close()

    # --- what the stage is asked

    def run(self, step: Step, hidden: torch.Tensor | None) -> Future[torch.Tensor]:
        """As `PipelineStage.run`, in its turn."""
        return self._ask(self._run, step, hidden)

    def forget_prompt(self, request: int, incarnation: int) -> None:
        """As `PipelineStage.forget_prompt`; the book forgets it too."""
        self.prompts.end(request)
        self._ask(self.stage.forget_prompt, request, incarnation)

    def copy(self, move: HeadMove, incarnation: int, first: int, last: int) -> None:
        """Copies positions ``first`` to ``last - 1`` of a move. Raises DeviceLostError."""
        where = move.source, move.target, move.request, incarnation, move.heads, first, last
        self._ask(self.stage.copy, *where).result()

    def export(
        self, device: int, request: Request, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of positions ``first`` to ``last - 1``, as `PipelineStage.export`. Raises DeviceLostError."""
        return self._ask(self.stage.export, device, request.number, request.incarnation, heads, first, last).result()

    def adopt(
        self, device: int, request: Request, heads: Sequence[int], first: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Writes KV that comes from elsewhere, before whatever is asked next; a device that is gone is noted.

        What else fails is raised by the next step, which would read what was not written.
        """
        done = self._ask(self.stage.adopt, device, request.number, request.incarnation, heads, first, k, v)
        done.add_done_callback(self._note_failed)
        self._note_lost(done, device)

    def is_same(self, move: HeadMove, incarnation: int, last: int) -> bool:
        """Whether both ends of a move hold the same at positions 0 to ``last - 1``. Raises DeviceLostError."""
        theirs, ours = (
            self._ask(self.stage.digest, device, move.request, incarnation, move.heads, last).result()
            for device in (move.source, move.target)
        )
        return bool((theirs == ours).all())

    def replace_device(self, index: int, device: AttentionDevice) -> None:
        """As `PipelineStage.replace_device`."""
        self._ask(self.stage.replace_device, index, device).result()

    def rejoin(self, index: int) -> Future[bool]:
        """As `PipelineStage.rejoin`, in its turn."""
        return self._ask(self.stage.rejoin, index)

    def settle(self) -> None:
        """Waits until the stage has done all that it was asked."""
        self._ask(lambda: None).result()

    def _run(self, step: Step, hidden: torch.Tensor | None) -> torch.Tensor:
        if self._failed is not None:
            raise self._failed
        return self.stage.run(step, hidden)

    def _note_failed(self, done: Future[None]) -> None:
        if (error := done.exception()) is not None and not isinstance(error, DeviceLostError):
            self._failed = error

    def _ask(self, act: Callable[..., T], *arguments: Any) -> Future[T]:
        if self._thread is not None:
            return self._thread.submit(act, *arguments)
        done: Future[T] = Future()
        try:
            done.set_result(act(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    # --- requests

    def admit(self, request: Request, *, growth: int) -> bool:
        """Finds a device for each of its heads; False: there is no room now."""
        heads = self.placement.admit(request.number, tokens=request.num_tokens, growth=growth)
        if heads is None:
            return False
        request.heads[self.number] = heads
        return True

    def grow(self, requests: Iterable[Request]) -> list[int]:
        """A page for the next position of each, where it has none yet; returns those that find no room."""
        book = self.placement
        return list(book.grow(r.number for r in requests if book.tokens(r.number) <= r.computed))

    def release(self, request: Request) -> None:
        """The request leaves the stage, and what it holds there is free."""
        for move in self.placement.moves:
            if move.request == request.number:
                self.drop(request, move.heads, move.target)
        self.placement.release(request.number)
        self.drop_all(request)

    def drop_all(self, request: Request, *, but: int | None = None) -> None:
        """Devices, ``but`` one that is lost, free what the request holds there."""
        self.forget_prompt(request.number, request.incarnation)
        heads = request.heads.pop(self.number)
        for device in sorted(set(heads) - {but}):
            self.drop(request, [head for head, owner in enumerate(heads) if owner == device], device)

    def drop(self, request: Request, heads: Sequence[int], device: int) -> None:
        """A device frees some heads; one that is gone is noted."""
        keys = [SequenceKey(request.number, request.incarnation, head) for head in heads]
        self._note_lost(self._ask(self.stage.drop, device, keys), device)

    def _note_lost(self, asked: Future[None], device: int) -> None:
        def note(done: Future[None]) -> None:
            if isinstance(done.exception(), DeviceLostError):
                self.lost.add(device)

        asked.add_done_callback(note)

    # --- moves

    def in_the_way(self, number: int) -> list[HeadMove]:
        """Moves that hold pages which a request needs to grow."""
        full = self.placement.full_devices(number)
        return [move for move in self.placement.moves if move.request == number or move.target in full]

    def way_out(self, request: Request) -> list[Split]:
        """Heads that leave a full device together, for a place with room for them and their growth; none: there is no
        such place."""
        free, owners, group = self.placement.state.free_blocks(), request.heads[self.number], self.placement.group
        pages = self.stage.shape.pages(request.computed + 1)
        takes = [device.status is DeviceStatus.OK for device in self.placement.state.devices]
        ways: list[tuple[int, list[Split]]] = []
        for source in dict.fromkeys(map(group.place, self.placement.full_devices(request.number))):
            for target in set(range(group.num_places)) - {source}:
                heads = group.leaving(owners, owners, source, target, group.unit(source, target))
                splits = group.split(owners, heads, target)
                to = {device: sum(len(s.heads) for s in splits if s.target == device) for _, _, device in splits}
                has_room = all(takes[i] and free[i] >= num * pages + owners.count(i) for i, num in to.items())
                if has_room and len(heads) == group.unit(source, target):
                    ways.append((min(int(free[device]) for device in to), splits))
            if ways:
                break
        return max(ways, key=lambda way: way[0])[1] if ways else []

    def flip(self, request: Request, move: HeadMove) -> None:
        """The book has committed the move: the request knows it from now on, and the source frees its heads."""
        request.heads[self.number] = self.placement.heads(request.number)
        self.drop(request, move.heads, move.source)

    def abort(self, request: Request, move: HeadMove) -> None:
        """The heads stay where they are, and what was copied is dropped."""
        self.placement.abort(move)
        self.drop(request, move.heads, move.target)
