"""What an engine tells a stage process to be, and how it becomes that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.stage import Stage, kv_shape
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.layout import DevicePages, StageLayout, refuse_if_too_large
from hetis.runtime.launch.memory import free_memory_bytes
from hetis.runtime.model.config import ModelConfig, read_config
from hetis.runtime.model.decoder import Decoder
from hetis.runtime.model.shard import Shard
from hetis.runtime.transport.errors import FrameError

Join = Callable[[str, KvShape, int], AttentionDevice]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSetup:
    """A stage, said in full.

    Attributes:
        stage: layers, ranks and devices.
        workers: devices that are attention workers in processes of their own; the others are the stage process's.
        dtype: of weights and KV.
        page_tokens: of a KV page.
        max_tokens: longest context; None: the model's.
    """

    stage: StageLayout
    workers: tuple[str, ...]
    dtype: str
    page_tokens: int
    max_tokens: int | None

    def shape(self, config: ModelConfig) -> KvShape:
        """Of its virtual sequences."""
        ranks = self.stage.ranks
        return kv_shape(config, self.stage.layers, page_tokens=self.page_tokens, dtype=self.dtype, ranks=ranks)

    def to_json(self) -> str:
        stage = self.stage
        said = {"first": stage.layers.start, "last": stage.layers.stop, "ranks": stage.ranks}
        devices = [asdict(device) for device in stage.devices]
        rest = {"dtype": self.dtype, "page_tokens": self.page_tokens, "max_tokens": self.max_tokens}
        return json.dumps({**said, "devices": devices, "workers": self.workers, **rest})

    @classmethod
    def from_json(cls, text: str | bytes) -> StageSetup:
        """Raises FrameError: it is not what `to_json` gives."""
        try:
            said = json.loads(text)
            layers = range(int(said["first"]), int(said["last"]))
            devices = tuple(DevicePages(name=str(d["name"]), pages=int(d["pages"])) for d in said["devices"])
            return cls(
                stage=StageLayout(layers=layers, ranks=int(said["ranks"]), devices=devices),
                workers=tuple(map(str, said["workers"])),
                dtype=str(said["dtype"]),
                page_tokens=int(said["page_tokens"]),
                max_tokens=None if said["max_tokens"] is None else int(said["max_tokens"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FrameError(f"a stage was set up by what is no setup: {error}") from error


class StageBuilder:
    """Makes the stage of one process; weights that are read already are kept for the next engine."""

    def __init__(self, folder: Path, join: Join) -> None:
        """``join`` finds an attention worker: its name, the shape of its virtual sequences, the engine's epoch."""
        self._folder, self._join = folder, join
        self._read: tuple[tuple[range, int, str, int | None], list[Decoder]] | None = None

    def __call__(self, setup: StageSetup, epoch: int) -> Stage:
        """The stage with nothing in it.

        Raises:
            ModelError: the folder cannot be used.
            LayoutError: the devices do not fit into memory.
            ChannelError, DeviceError: an attention worker did not come.
        """
        config, stage = read_config(self._folder), setup.stage
        decoders, shape = self._decoders(setup), setup.shape(config)
        here = sum(device.pages for device in stage.devices if device.name not in setup.workers)
        refuse_if_too_large(here * shape.page_bytes, free_bytes=free_memory_bytes())
        devices = [
            self._join(device.name, shape, epoch)
            if device.name in setup.workers
            else LocalDevice(device.name, shape, device.pages)
            for device in stage.devices
        ]
        return Stage(decoders, devices)

    def _decoders(self, setup: StageSetup) -> list[Decoder]:
        stage = setup.stage
        key = stage.layers, stage.ranks, setup.dtype, setup.max_tokens
        if self._read is None or self._read[0] != key:
            self._read = None  # first free, then take
            decoders = [
                Decoder.from_folder(
                    self._folder,
                    layers=stage.layers,
                    shard=Shard(rank=rank, size=stage.ranks),
                    dtype=setup.dtype,
                    max_tokens=setup.max_tokens,
                )
                for rank in range(stage.ranks)
            ]
            self._read = key, decoders
        return self._read[1]
