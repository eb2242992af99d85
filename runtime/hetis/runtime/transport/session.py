"""One connection of an engine: what all its frames say of whose they are."""

from __future__ import annotations

import secrets

from hetis.runtime.transport.frames import Frame, FrameKind, Numbers


class Session:
    """Makes the frames of one connection, each with a serial of its own, from 1 on.

    Attributes:
        epoch: of the engine.
        number: of the connection, drawn at random, so that no two have the same.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch, self.number = epoch, secrets.randbits(63)
        self._serial = 0

    def frame(
        self,
        kind: FrameKind,
        *,
        step: int = 0,
        layer: int = 0,
        counts: tuple[int, int, int] = (0, 0, 0),
        dtype: str = "",
        parts: tuple[Numbers, ...] = (),
    ) -> Frame:
        """A frame of this connection; what `Frame` says of the arguments."""
        self._serial += 1
        return Frame(
            kind=kind,
            epoch=self.epoch,
            session=self.number,
            serial=self._serial,
            step=step,
            layer=layer,
            counts=counts,
            dtype=dtype,
            parts=parts,
        )

    def has(self, frame: Frame) -> bool:
        """Return whether a frame is of this connection."""
        return (frame.epoch, frame.session) == (self.epoch, self.number)
