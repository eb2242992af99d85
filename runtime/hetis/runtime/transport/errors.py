"""Errors between the two ends of a channel.

HetisError
+-- ChannelError   the channel is no longer usable
    +-- ChannelClosedError    the other end closed it, or died
    +-- ChannelStalledError   nothing arrived, or nothing could be sent, for too long
    +-- FrameError            what arrived is not a valid frame, or not one expected here
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class ChannelError(HetisError):
    """The channel failed. The other end may be well, but can no longer be reached through it."""


class ChannelClosedError(ChannelError):
    """The other end closed the channel, or died."""


class ChannelStalledError(ChannelError):
    """The other end did not send, or accept, what it should have within the time limit."""


class FrameError(ChannelError):
    """Bytes that are not a frame, or an unexpected frame: the rest of the stream cannot be trusted."""
