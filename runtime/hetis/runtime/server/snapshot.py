"""How the engine is between two steps, as a value that other threads may read."""

from __future__ import annotations

from dataclasses import dataclass, field

from hetis.runtime.engine.engine import Engine
from hetis.runtime.server.moving import MovingView
from hetis.solver.dispatch.snapshot import DeviceStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """One device of a stage: pages in all and in use, and the KV heads of requests that live there."""

    name: str
    stage: int
    pages: int
    used_pages: int
    page_bytes: int
    heads: int
    is_up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsView:
    """KV of prompts under way on the primary of one stage: bytes that are counted now, and at most."""

    stage: int
    kv_bytes: int
    most_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """A running request: positions whose KV is held, and output tokens so far.

    ``heads`` has the device of each of its KV heads, stage after stage, as an index into `EngineView.devices`.
    """

    number: int
    heads: tuple[int, ...]
    computed: int
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """The engine between two steps; counts are since it started.

    ``aside``: of those who wait, how many do so for devices that are away.
    """

    devices: tuple[DeviceView, ...]
    prompts: tuple[PromptsView, ...] = ()
    running: tuple[RequestView, ...] = ()
    waiting: int = 0
    aside: int = 0
    steps: int = 0
    preempted: int = 0
    moved_heads: int = 0
    page_tokens: int = 16
    moving: MovingView = field(default_factory=MovingView)

    @property
    def kv_use_ratio(self) -> float:
        """Share of all pages that requests hold."""
        pages = sum(device.pages for device in self.devices)
        return sum(device.used_pages for device in self.devices) / pages if pages else 0.0


def view_of(engine: Engine, moving: MovingView | None = None) -> EngineView:
    """The engine as it is now; called by the thread that runs it. ``moving`` None: nothing moves its heads."""
    devices: list[DeviceView] = []
    owners: dict[int, list[int]] = {number: [] for number in engine.running}
    for part in engine.stages:
        begin, heads = len(devices), [0] * len(part.stage.devices)
        for request in engine.running.values():
            for owner in request.heads.get(part.number, ()):
                heads[owner] += 1
                owners[request.number].append(begin + owner)
        free = part.placement.state.free_blocks()
        devices += [
            DeviceView(
                name=device.name,
                stage=part.number,
                pages=device.num_pages,
                used_pages=device.num_pages - int(free[i]),
                page_bytes=part.stage.shape.page_bytes,
                heads=heads[i],
                is_up=part.placement.state.devices[i].status is DeviceStatus.OK,
            )
            for i, device in enumerate(part.stage.devices)
        ]
    return EngineView(
        devices=tuple(devices),
        prompts=tuple(
            PromptsView(
                stage=part.number,
                kv_bytes=part.prompts.tokens * part.token_bytes,
                most_bytes=part.prompts.most_tokens * part.token_bytes,
            )
            for part in engine.stages
        ),
        running=tuple(
            RequestView(
                number=request.number,
                heads=tuple(owners[request.number]),
                computed=request.computed,
                output=len(request.output),
            )
            for request in engine.running.values()
        ),
        waiting=len(engine.waiting),
        aside=sum(request.number in engine.aside for request in engine.waiting),
        steps=engine.num_steps,
        preempted=engine.num_preempted,
        moved_heads=engine.num_moved_heads,
        page_tokens=engine.stages[0].stage.shape.page_tokens,
        moving=moving or MovingView(),
    )
