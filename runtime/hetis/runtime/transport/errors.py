"""What can go wrong between two ends of a channel.

HetisError
+-- ChannelError            the channel is of no use any more
    +-- ChannelClosedError  the other end closed it, or died
    +-- ChannelStalledError nothing came, or nothing could be sent, for too long
    +-- FrameError          what came is no frame of ours, or not one that fits here
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class ChannelError(HetisError):
    """The channel failed; whoever is at the other end may be well, but is not reached this way any more."""


class ChannelClosedError(ChannelError):
    """The other end closed the channel, or died."""


class ChannelStalledError(ChannelError):
    """The other end did not send, or take, what it should have within the time allowed."""


class FrameError(ChannelError):
    """Bytes that are no frame, or a frame that does not fit: the stream cannot be trusted from here on."""
