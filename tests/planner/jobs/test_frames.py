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
    Infeasible,
    Invalid,
    NothingFound,
    Unsound,
    answer_from_frame,
    answer_to_frame,
)

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
    Infeasible(("a", "b")),
    NothingFound("no time"),
    Unsound(("c",)),
    Invalid("d"),
]


def test_every_answer_survives_the_way() -> None:
    assert [answer_from_frame(answer_to_frame(answer)) for answer in ANSWERS] == ANSWERS
    assert answer_from_frame(JobFrame(kind="ready", fields={})) is None
