"""The one file that configures the plugin: attention workers, and the rules for placing and moving head groups.

    apiVersion: hetis/v1
    kind: VllmWorkers
    workers:
      - name: p100-0
        addresses: [10.0.0.7:7070]     # one per rank: pipeline stages in order, in each the tensor-parallel ranks
        keyFile: /etc/hetis/p100-0.key

Every process of vLLM reads it: the path is in HETIS_VLLM_CONFIG. Without that variable the plugin does nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.alias_generators import to_camel

from hetis.commands.endpoints import split_address
from hetis.formats.errors import DocumentError
from hetis.formats.files import read_text
from hetis.formats.positions import parse_text
from hetis.solver.errors import HetisError

VARIABLE = "HETIS_VLLM_CONFIG"


class SettingsError(HetisError):
    """The file of `VARIABLE` is not usable. The message names it and every problem."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


class WorkerSettings(_Document):
    """One attention worker: a device for the scheduler, with one process (or GPU) for each rank."""

    # Name of the device. If a planner steers, it is the planner's name for its GPU, ``node/index``.
    name: str = Field(min_length=1, max_length=63)
    addresses: tuple[str, ...] = Field(min_length=1)  # ``host:port`` of its process for each rank of vLLM, rank 0 first
    key_file: Path  # file with the key that the processes were started with

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name == "here":
            raise ValueError("'here' is what the ranks themselves are called")
        return name

    @field_validator("addresses")
    @classmethod
    def _check_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            try:
                split_address(address)
            except ValueError:
                raise ValueError(f"{address!r} is not host:port") from None
        return addresses


class DispatchSettings(_Document):
    """Policy for where the head groups of new requests go."""

    # ``solver``: `hetis.solver.dispatch` decides; ``local``: all stay on the rank while it has room; ``remote``: as
    # many as fit go to workers, in turn (for experiments)
    policy: Literal["solver", "local", "remote"] = "solver"
    # Output tokens assumed for a request unless its ``max_tokens`` is smaller
    expected_output_tokens: int = Field(default=256, ge=1, le=2**20)


class EngineRedispatchSettings(_Document):
    """Policy for when head groups of running requests move."""

    enabled: bool = True  # whether they move while no planner has assigned a replica
    theta: float = Field(default=0.5, ge=0.0, le=100.0)  # excess ratio over the ideal step time from which a look pays
    every_steps: int = Field(default=16, ge=1)  # number of steps between two looks
    # Maximum KV that a rank copies in one step besides its computation
    copy_bytes_per_step: int = Field(default=8 << 20, ge=1 << 10)


class PluginSettings(_Document):
    """The whole file."""

    api_version: Literal["hetis/v1"]
    kind: Literal["VllmWorkers"]
    workers: tuple[WorkerSettings, ...] = ()
    # How ranks reach workers: shared memory on one host, else TCP (``auto``), or one of the two
    transport: Literal["auto", "shm", "tcp"] = "auto"
    encrypt: bool = False  # whether queries, KV and outputs are encrypted on TCP, with keys of each connection
    timeout_s: float = Field(default=10.0, ge=0.1, le=3600.0)  # a worker that does not answer for this long is lost
    # Tokens per page on workers; must divide those of vLLM's blocks (`require_whole_pages`)
    page_tokens: int = Field(default=16, ge=1, le=1024)
    # vLLM's attention backend for groups on the ranks. None: the platform's first choice.
    base_backend: Literal["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"] | None = None
    # Steps of a GPU that are CUDA graphs: those between attentions (``piecewise``), or also a whole decode step all of
    # whose head groups are on the rank (``full``; not measured on a GPU yet, vLLM 0.32 only)
    graphs: Literal["piecewise", "full"] = "piecewise"
    dispatch: DispatchSettings = DispatchSettings()
    redispatch: EngineRedispatchSettings = EngineRedispatchSettings()
    executor: Path | None = None  # Unix socket on which the node's agent reaches the engine. None: no agent steers it.
    calibrate: bool = True  # measure the ranks, and every worker when it joins, and follow measured steps from then on

    @model_validator(mode="after")
    def _check_workers(self) -> PluginSettings:
        names = [worker.name for worker in self.workers]
        if len(set(names)) < len(names):
            raise ValueError(f"worker names are not unique: {', '.join(names)}")
        addresses = [address for worker in self.workers for address in worker.addresses]
        if len(set(addresses)) < len(addresses):  # a worker process serves one connection: each would end the other
            raise ValueError(f"addresses of workers are not unique: {', '.join(addresses)}")
        ranks = {len(worker.addresses) for worker in self.workers}
        if len(ranks) > 1:
            raise ValueError(f"workers have {sorted(ranks)} addresses, all must have one for each rank")
        return self


def require_whole_pages(settings: PluginSettings, block_tokens: int) -> None:
    """Raise SettingsError unless a block of vLLM is a whole number of pages: a short sequence takes a whole page."""
    if block_tokens % settings.page_tokens:
        why = f"pageTokens is {settings.page_tokens}, must divide the {block_tokens} tokens of vLLM's blocks"
        raise SettingsError(f"{VARIABLE}: {why}")


def read_settings() -> PluginSettings | None:
    """Return the settings in the file that `VARIABLE` names, or None. Raises SettingsError if they are not valid."""
    path = os.environ.get(VARIABLE)
    return None if not path else load_settings(Path(path))


def load_settings(path: Path) -> PluginSettings:
    """Return the settings in a file. Raises SettingsError with all problems at once."""
    try:
        data, source = parse_text(read_text(path), str(path))
    except DocumentError as error:
        raise SettingsError(f"{VARIABLE}: " + "; ".join(map(str, error.problems))) from None
    if source.problems:
        raise SettingsError(f"{VARIABLE}: " + "; ".join(map(str, source.problems)))
    try:
        return PluginSettings.model_validate(data)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors()]
        raise SettingsError(f"{VARIABLE}: {path}: " + "; ".join(problems)) from None
