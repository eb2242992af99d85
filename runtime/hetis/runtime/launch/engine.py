"""Puts an engine together: the primary in this process, other devices here or in processes of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.part import PipelineStage
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.engine.stage import Stage, kv_shape
from hetis.runtime.engine.text import Tokenizer
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.compute import refuse_too_large, refusing_out_of_memory
from hetis.runtime.launch.layout import StageLayout
from hetis.runtime.launch.workers import Workers
from hetis.runtime.model.config import ModelConfig, read_config
from hetis.runtime.model.decoder import Decoder
from hetis.runtime.model.shard import Shard
from hetis.runtime.stages.setup import StageSetup

ChooseStages = Callable[[ModelConfig], tuple[StageLayout, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFolder:
    """What an engine is made of; ``dtype`` None: the checkpoint's."""

    folder: Path
    dtype: str | None
    page_tokens: int
    options: EngineOptions

    def shape(self, config: ModelConfig, layers: range, *, ranks: int = 1) -> KvShape:
        """Of the virtual sequences of a stage."""
        dtype = self.dtype or config.dtype
        return kv_shape(config, layers, page_tokens=self.page_tokens, dtype=dtype, ranks=ranks)

    def setup(self, config: ModelConfig, stage: StageLayout, workers: Sequence[str]) -> StageSetup:
        """What a stage process is told to be; ``workers`` are the names of all attention workers."""
        return StageSetup(
            stage=stage,
            workers=tuple(device.name for device in stage.devices if device.name in workers),
            dtype=self.dtype or config.dtype,
            page_tokens=self.page_tokens,
            max_tokens=self.options.max_tokens,
        )

    def prompt_bytes(
        self, config: ModelConfig, stages: Sequence[StageLayout], here: Sequence[StageLayout], *, is_all: bool
    ) -> dict[str, int]:
        """By device of torch, KV of prompts under way at most, on the primaries of the stages ``here``.

        That is the longest prompt that the devices of all ``stages`` hold, and a chunk: as `Engine` counts it. Not
        ``is_all``: others come, whose memory is not known yet.
        """
        longest = min(self.options.max_tokens or config.max_tokens, config.max_tokens)
        if is_all:
            pages = dict[range, int]()  # of the largest of a stage's copies, for each head
            for stage in stages:
                each = sum(device.pages for device in stage.devices) // max(config.kv_heads, stage.ranks)
                pages[stage.layers] = max(each, pages.get(stage.layers, 0))
            longest = min(longest, min(pages.values()) * self.page_tokens)
        needed: Counter[str] = Counter()
        for stage in here:
            shape = self.shape(config, stage.layers, ranks=stage.ranks)
            heads = max(config.kv_heads, stage.ranks) // stage.ranks
            for device in stage.primary:
                tokens = longest + self.options.chunk_tokens
                needed[device] += tokens * heads * shape.page_bytes // self.page_tokens
        return needed

    def decoders(self, layers: range, devices: Sequence[str]) -> list[Decoder]:
        """The dense part of a stage: of each rank the weights of its share of these layers, on its device of torch.

        Raises:
            ModelError: the folder cannot be used.
        """
        return [
            Decoder.from_folder(
                self.folder,
                layers=layers,
                shard=Shard(rank=rank, size=len(devices)),
                dtype=self.dtype,
                device=device,
                max_tokens=self.options.max_tokens,
            )
            for rank, device in enumerate(devices)
        ]


@refusing_out_of_memory()
def start_engine(
    made_of: EngineFolder,
    choose: ChooseStages,
    tokenizer: Tokenizer,
    workers: Workers | None = None,
    processes: Mapping[int, str] | None = None,
) -> Engine:
    """Loads the model and takes the memory; ``choose`` says which stages there are, once the model is known.

    A device that has the name of a worker is that process, which has its own memory; workers that are no device yet
    come after the others of the first stage. ``processes`` are the names of those that stages run in, by their number;
    the others are here, copies of one stage on the same devices of torch with the same weights.

    Raises:
        ModelError: the folder cannot be used.
        LayoutError: the devices do not fit into memory, or a GPU is not there.
        ChannelError, DeviceError: a worker or a stage process did not come, or does not answer.
    """
    config, processes = read_config(made_of.folder), processes or {}
    chosen = choose(config)
    here = [stage for number, stage in enumerate(chosen) if number not in processes]
    remote = workers.names if workers else ()
    own = [
        (device, made_of.shape(config, stage.layers, ranks=stage.ranks))
        for stage in here
        for device in stage.devices
        if device.name not in remote
    ]
    dense: dict[tuple[range, tuple[str, ...]], list[Decoder]] = {}
    for stage in here:
        key = stage.layers, stage.primary
        dense[key] = dense.get(key) or made_of.decoders(*key)
    is_all = workers is None or set(workers.names) <= {device.name for stage in chosen for device in stage.devices}
    refuse_too_large(own, prompt_bytes=made_of.prompt_bytes(config, chosen, here, is_all=is_all))
    placed = {device.name for stage in chosen for device in stage.devices}
    stages: list[PipelineStage] = []
    for number, stage in enumerate(chosen):
        if number in processes:
            assert workers is not None, "processes need a store"
            stages.append(workers.stage(processes[number], made_of.setup(config, stage, remote), config))
            continue
        shape = made_of.shape(config, stage.layers, ranks=stage.ranks)
        devices: list[AttentionDevice] = []
        for device in stage.devices:
            if device.name not in remote:
                devices.append(LocalDevice(device.name, shape, device.pages, device=device.device))
            elif workers is not None:
                devices.append(workers.wait_for(device.name, shape))
        if workers is not None and number == 0:
            devices += [workers.wait_for(name, shape) for name in remote if name not in placed]
        stages.append(Stage(dense[stage.layers, stage.primary], devices))
    epoch = workers.epoch if workers else 1
    return Engine(config, stages, options=made_of.options, tokenizer=tokenizer, epoch=epoch, overlaps=bool(processes))


def warm_up(engine: Engine) -> None:
    """One short request, so that the first client does not wait for what is compiled or allocated once."""
    if not engine.could_hold(3):
        return
    engine.add([0, 0], SamplingParams(max_tokens=2, ignore_eos=True))
    while engine.has_work:
        engine.step()
    engine.settle()
