"""What an engine tells a stage process to be, and how it becomes that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.stage import Stage, kv_shape
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.compute import on_devices, refuse_too_large, refusing_out_of_memory
from hetis.runtime.launch.layout import DevicePages, StageLayout
from hetis.runtime.launch.room import Compute
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
        # Not on which GPU each is: that is for the stage process to say.
        devices = [{"name": device.name, "pages": device.pages} for device in stage.devices]
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

    def __init__(self, folder: Path, join: Join, *, compute: Compute = Compute.CPU) -> None:
        """``join`` finds an attention worker: its name, the shape of its virtual sequences, the engine's epoch."""
        self._folder, self._join, self._compute = folder, join, compute
        self._read: tuple[tuple[range, tuple[str, ...], str, int | None], list[Decoder]] | None = None

    @refusing_out_of_memory()
    def __call__(self, setup: StageSetup, epoch: int) -> Stage:
        """The stage with nothing in it.

        Raises:
            ModelError: the folder cannot be used.
            LayoutError: the devices do not fit into memory, or there are too few GPUs.
            ChannelError, DeviceError: an attention worker did not come.
        """
        shape = setup.shape(read_config(self._folder))
        (stage,) = on_devices((setup.stage,), self._compute, workers=setup.workers)
        decoders = self._decoders(setup, stage.primary)
        refuse_too_large((device, shape) for device in stage.devices if device.name not in setup.workers)
        devices = [
            self._join(device.name, shape, epoch)
            if device.name in setup.workers
            else LocalDevice(device.name, shape, device.pages, device=device.device)
            for device in stage.devices
        ]
        return Stage(decoders, devices)

    def _decoders(self, setup: StageSetup, devices: tuple[str, ...]) -> list[Decoder]:
        stage = setup.stage
        key = stage.layers, devices, setup.dtype, setup.max_tokens
        if self._read is None or self._read[0] != key:
            self._read = None  # first free, then take
            decoders = [
                Decoder.from_folder(
                    self._folder,
                    layers=stage.layers,
                    shard=Shard(rank=rank, size=stage.ranks),
                    dtype=setup.dtype,
                    device=device,
                    max_tokens=setup.max_tokens,
                )
                for rank, device in enumerate(devices)
            ]
            self._read = key, decoders
        return self._read[1]
