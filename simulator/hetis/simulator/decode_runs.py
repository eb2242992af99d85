"""Runs of iterations that only decode, computed together.

Until a request finishes, arrives or needs a block that is not free, nothing changes from one iteration of a replica's
only micro-batch to the next but the tokens that it attends to. Their times are therefore sums of known terms, in the
order in which single events would add them, so that a run of them ends at the same time to the last digit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hetis.simulator.micro_batch import MicroBatch
from hetis.simulator.values import FloatArray

FEWEST = 8  # iterations that are worth a run
MOST = 4096


class DecodeRun(NamedTuple):
    """Successive iterations of a micro-batch, of which the first has begun.

    ``ends_s`` [iterations, stages] are when each leaves a stage; ``attended`` the tokens that it attends to;
    ``blocks`` the KV blocks that it and those before it take, the first excepted. Nobody asks how busy copies were.
    """

    ends_s: FloatArray
    attended: FloatArray
    blocks: npt.NDArray[np.int64]

    def advance(self, batch: MicroBatch, current: int) -> None:
        """Bring a micro-batch from the first iteration to another one."""
        batch.step += current
        batch.attended = float(self.attended[current])
        for room in batch.rooms:
            room.used += int(self.blocks[current])
        for number, copy in enumerate(batch.copies):
            copy.free_s = float(self.ends_s[current, number])


def next_iterations(now_s: float, batch: MicroBatch) -> DecodeRun | None:
    """Return the iterations from the current one to the next in which a request finishes; None: they are few."""
    while (last := min(batch.finishing)) < batch.step:  # of an earlier stay
        del batch.finishing[last]
    if batch.leaving_window:
        last = min(last, min(batch.leaving_window) - 1)
    num = min(last - batch.step + 1, MOST)
    if num < FEWEST:
        return None
    steps = np.arange(batch.step, batch.step + num)
    taken = np.array(batch.phases)[steps % len(batch.phases)]
    if batch.growth.frees:
        taken += np.array(batch.late_phases)[steps % len(batch.late_phases)]
    taken[0] = 0  # it has them
    blocks = taken.cumsum()
    if batch.rooms and blocks[-1] > (free := min(room.total - room.used for room in batch.rooms)):
        num = int(blocks.searchsorted(free, side="right"))
        if num < FEWEST:
            return None
        blocks = blocks[:num]
    attended = np.empty(num)
    attended.fill(batch.growth_of_attended())
    attended[0] = batch.attended
    attended.cumsum(out=attended)
    times, decoding = np.empty(1 + num * len(batch.copies)), len(batch.decoding)
    times[0] = now_s
    seconds, before = times[1:].reshape(num, -1), None
    for number, copy in enumerate(batch.copies):
        is_like_before = copy.timing is before  # as equal stages are
        before = copy.timing
        seconds[:, number] = seconds[:, number - 1] if is_like_before else before.decode_seconds(decoding, attended)
    ends_s = times.cumsum()[1:].reshape(seconds.shape)
    return DecodeRun(ends_s, attended, blocks)
