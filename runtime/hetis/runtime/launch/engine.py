"""Puts an engine together: the primary in this process, other devices here or in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.engine.stage import Stage, kv_shape
from hetis.runtime.engine.text import Tokenizer
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.layout import DevicePages, refuse_if_too_large
from hetis.runtime.launch.memory import free_memory_bytes
from hetis.runtime.launch.workers import Workers
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.model.decoder import Decoder

ChooseDevices = Callable[[ModelConfig, KvShape], tuple[DevicePages, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFolder:
    """What an engine is made of; ``dtype`` None: the checkpoint's."""

    folder: Path
    dtype: str | None
    page_tokens: int
    options: EngineOptions


def start_engine(
    made_of: EngineFolder, choose: ChooseDevices, tokenizer: Tokenizer, workers: Workers | None = None
) -> Engine:
    """Loads the model and takes the memory; ``choose`` says which devices there are, once the model is known.

    A device that has the name of a worker is that process, which has its own memory; workers that are no device yet
    come after the others.

    Raises:
        ModelError: the folder cannot be used.
        LayoutError: the devices do not fit into memory.
        ChannelError, DeviceError: a worker did not come, or does not answer.
    """
    decoder = Decoder.from_folder(made_of.folder, dtype=made_of.dtype, max_tokens=made_of.options.max_tokens)
    shape = kv_shape(
        decoder.config,
        decoder.layers,
        page_tokens=made_of.page_tokens,
        dtype=made_of.dtype or decoder.config.dtype,
    )
    chosen, remote = choose(decoder.config, shape), workers.names if workers else ()
    here = tuple(device for device in chosen if device.name not in remote)
    refuse_if_too_large(here, shape, free_bytes=free_memory_bytes())
    names = list(dict.fromkeys([*(device.name for device in chosen), *remote]))
    pages = {device.name: device.pages for device in here}
    devices: list[AttentionDevice] = []
    for name in names:
        if name in pages:
            devices.append(LocalDevice(name, shape, pages[name]))
        else:
            assert workers is not None
            devices.append(workers.wait_for(name, shape))
    epoch = workers.epoch if workers else 1
    return Engine(decoder.config, Stage(decoder, devices), options=made_of.options, tokenizer=tokenizer, epoch=epoch)


def warm_up(engine: Engine) -> None:
    """One short request, so that the first client does not wait for what is compiled or allocated once."""
    if not engine.placement.could_hold(3):
        return
    engine.add([0, 0], SamplingParams(max_tokens=2, ignore_eos=True))
    while engine.has_work:
        engine.step()
