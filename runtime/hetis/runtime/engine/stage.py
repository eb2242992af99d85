"""A stage: some layers of the model, and the devices that hold the KV of these layers. The primary runs this code."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hetis.runtime.attention.device import AttentionDevice, DeviceStep, Pending
from hetis.runtime.attention.prefill import PromptKv
from hetis.runtime.engine.step import Chunk, Step
from hetis.runtime.kv.errors import DeviceError
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.model.decoder import Decoder, Positions


def kv_shape(config: ModelConfig, layers: range, *, page_tokens: int, dtype: str) -> KvShape:
    """What the virtual sequences of a stage with these layers look like."""
    return KvShape(
        layers=len(layers),
        head_dim=config.head_dim,
        queries_per_group=config.queries_per_group,
        page_tokens=page_tokens,
        dtype=dtype,
        scale=config.head_dim**-0.5,
        windows=config.windows[layers.start : layers.stop],
    )


class Stage:
    """Layers and the devices of their heads; device 0 is in this process, the primary itself.

    A step that raises has changed nothing that counts: the same step, or another, may be run next.
    """

    def __init__(self, decoder: Decoder, devices: Sequence[AttentionDevice]) -> None:
        self.decoder, self.devices = decoder, list(devices)
        self.shape = devices[0].shape
        self._prompts: dict[tuple[int, int], PromptKv] = {}

    def run(self, step: Step, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [T, hidden] after the stage's layers, or of the last stage the logits [O, vocab].

        ``hidden`` is what the stage before returned; None on the first.

        Raises:
            DeviceError: of the device that failed. No other device holds anything of the step.
        """
        with torch.inference_mode():
            return self._run(step, hidden)

    def forget_prompt(self, request: int, incarnation: int) -> None:
        """The prompt's KV here is not needed any more: it was prefilled, or it begins anew."""
        self._prompts.pop((request, incarnation), None)

    @property
    def prompts(self) -> tuple[tuple[int, int], ...]:
        """Requests whose prompt is kept, with their incarnations."""
        return tuple(self._prompts)

    # --- inside

    def _run(self, step: Step, hidden: torch.Tensor | None) -> torch.Tensor:
        decoder = self.decoder
        positions = decoder.positions(torch.from_numpy(step.positions).to(decoder.device))
        if hidden is None:
            hidden = decoder.embed(torch.from_numpy(step.tokens).to(decoder.device), positions)
        shares = self._shares(step)
        try:
            for share in shares:
                share.device.begin(share.step)
            for layer in range(len(decoder.layers)):
                hidden = self._layer(layer, step, shares, hidden, positions)
            for share in shares:
                share.device.finish(step.number)
            for chunk in step.chunks:
                self._ship(chunk)
        except DeviceError:
            self._abort(step, shares)
            raise
        if decoder.weights.output is None:
            return hidden
        return decoder.output(hidden[torch.from_numpy(step.outputs).to(decoder.device)])

    def _shares(self, step: Step) -> list[_Share]:
        """Which device has which decoding virtual sequences; the primary last, so that others compute meanwhile."""
        flat = step.heads.ravel()
        groups = step.heads.shape[1]
        shares = []
        for number in reversed(np.unique(flat)):
            device = self.devices[number]
            everything = bool(np.all(flat == number))
            members = np.flatnonzero(flat == number)
            row = members // groups
            part = DeviceStep(
                epoch=step.epoch,
                number=step.number,
                requests=step.requests[row],
                incarnations=step.incarnations[row],
                heads=members % groups,
                positions=step.positions[row],
            )
            index = None if everything else torch.from_numpy(members).to(self.decoder.device)
            shares.append(_Share(device, part, index))
        return shares

    def _layer(
        self, layer: int, step: Step, shares: list[_Share], hidden: torch.Tensor, positions: Positions
    ) -> torch.Tensor:
        q, k, v = self.decoder.project(layer, hidden, positions)
        outputs = []
        rows = len(step.requests)
        if rows:
            outputs.append(self._decode(layer, shares, q[:rows], k[:rows], v[:rows]))
        for chunk in step.chunks:
            part = slice(rows, rows + chunk.count)
            outputs.append(self._prompt(chunk).attend(layer, chunk.first, q[part], k[part], v[part]))
            rows += chunk.count
        return self.decoder.finish(layer, hidden, outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def _decode(
        self, layer: int, shares: list[_Share], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Outputs [B, q_heads * d]: every virtual sequence computed where it lives, put together again."""
        shape, rows = self.shape, len(q)
        q = q.reshape(-1, shape.queries_per_group, shape.head_dim)
        k, v = k.reshape(-1, shape.head_dim), v.reshape(-1, shape.head_dim)
        if len(shares) == 1 and shares[0].members is None:
            return shares[0].device.attend(layer, q, k, v).wait().to(q.device).view(rows, -1)
        pending: list[tuple[torch.Tensor, Pending]] = []
        for share in shares:
            index = share.members
            assert index is not None, "several devices share the heads, one cannot have them all"
            pending.append((index, share.device.attend(layer, q[index], k[index], v[index])))
        out = torch.empty_like(q)
        for index, part in pending:
            out[index] = part.wait().to(out.device)
        return out.view(rows, -1)

    def _prompt(self, chunk: Chunk) -> PromptKv:
        key = chunk.request, chunk.incarnation
        if key not in self._prompts:
            self._prompts[key] = PromptKv(self.shape, len(chunk.heads), chunk.total, self.decoder.device)
        return self._prompts[key]

    def _ship(self, chunk: Chunk) -> None:
        """The chunk's KV goes to where the heads live, the primary included."""
        prompt, part = self._prompt(chunk), slice(chunk.first, chunk.first + chunk.count)
        for number in sorted(set(chunk.heads)):
            heads = [head for head, owner in enumerate(chunk.heads) if owner == number]
            k, v = (x[:, heads, part].transpose(0, 1) for x in (prompt.k, prompt.v))
            self.devices[number].adopt(chunk.request, chunk.incarnation, heads, chunk.first, k, v)

    def _abort(self, step: Step, shares: list[_Share]) -> None:
        for share in shares:
            # The one that failed, or another that did meanwhile: the engine hears of that at the next step.
            with contextlib.suppress(DeviceError):
                share.device.abort(step.number)


class _Share(NamedTuple):
    """What one device computes of a step: its rows among the B * G virtual sequences, None for all of them."""

    device: AttentionDevice
    step: DeviceStep
    members: torch.Tensor | None
