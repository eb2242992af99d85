from __future__ import annotations

import asyncio
import io
import os

from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.jobs.frames import JobFrame, read_frame, receive_frame, to_bytes
from hetis.planner.jobs.messages import (
    Answer,
    FoundPlan,
    answer_from_frame,
    answer_to_frame,
)
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError, UncheckedPlanError

FIELDS = st.dictionaries(st.text().filter(lambda name: name != "kind"), st.integers() | st.text() | st.booleans())
FRAMES = st.builds(JobFrame, kind=st.text(), fields=FIELDS, payload=st.binary())


@given(st.lists(FRAMES))
def test_frames_arrive_as_they_were_sent(frames: list[JobFrame]) -> None:
    pipe = io.BytesIO(b"".join(map(to_bytes, frames)))
    assert [read_frame(pipe) for _ in frames] == frames
    assert read_frame(pipe) is None


@given(FRAMES, st.data())
def test_a_frame_that_is_cut_off_is_none(frame: JobFrame, data: st.DataObject) -> None:
    whole = to_bytes(frame)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert read_frame(io.BytesIO(part)) is None

    async def receive() -> JobFrame | None:
        reader = asyncio.StreamReader()
        reader.feed_data(part)
        reader.feed_eof()
        return await receive_frame(reader)

    assert asyncio.run(receive()) is None


ANSWERS: list[Answer] = [
    FoundPlan(os.urandom(8), os.urandom(8)),
    InfeasibleError(("a", "b")),
    NoPlanFoundError("no time"),
    UncheckedPlanError(("c",)),
    InvalidProblemError("d"),
]


def test_every_answer_survives_the_way() -> None:
    returned = [answer_from_frame(answer_to_frame(answer)) for answer in ANSWERS]
    assert returned[0] == ANSWERS[0]
    assert [(type(one), str(one), vars(one)) for one in returned[1:]] == [
        (InfeasibleError, "a; b", {"reasons": ("a", "b")}),
        (NoPlanFoundError, "no time", {}),
        (UncheckedPlanError, str(ANSWERS[3]), {"violations": ("c",)}),
        (InvalidProblemError, "d", {}),
    ]
    assert answer_from_frame(JobFrame(kind="ready", fields={})) is None
