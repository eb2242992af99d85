"""The stages of an engine's pipeline have one model, whose makespan is the time of the slowest stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.convert.stages import merged, stage_from_proto, stages_of_replica
from hetis.planner.use_cases.dispatch.stages import stage_times
from hetis.planner.use_cases.saved_plans import load_plan_and_problem
from hetis.v1.stage_pb2 import AttentionPiece, HeadShape, StageDevice, StageModel
from tests.fleets import fleet

HEADS = HeadShape(
    head_groups=8, queries_per_group=4, kv_bytes_per_token=256, exchange_bytes_per_head=320, block_tokens=16
)
seconds = st.floats(0, 1e-3)
pieces = st.builds(AttentionPiece, head_s=seconds, kv_byte_s=st.floats(0, 1e-9), call_s=seconds)


@st.composite
def pipelines(draw: st.DrawFn) -> list[StageModel]:
    """Return stages of one to six layers whose devices at the same place may cost anything."""
    num_workers, tp = draw(st.integers(0, 3)), draw(st.sampled_from((1, 2)))
    return [
        StageModel(
            stage=s,
            num_layers=draw(st.integers(1, 6)),
            heads=HEADS,
            devices=[
                StageDevice(
                    name=f"s{s}/{place}",
                    gpus=[f"s{s}/{place + 10 * rank}" for rank in range(1 if place else tp)],
                    is_primary=not place,
                    pieces=draw(st.lists(pieces, min_size=1, max_size=2)),
                    transfer_byte_s=draw(st.floats(0, 1e-8)) if place else 0,
                    transfer_s=draw(seconds) if place else 0,
                    link_byte_s=draw(st.floats(0, 1e-8)),
                    total_blocks=draw(st.integers(0, 1000)),
                )
                for place in range(num_workers + 1)
            ],
        )
        for s in range(draw(st.integers(1, 4)))
    ]


@given(pipelines(), st.data())
def test_a_merged_model_takes_as_long_as_the_slowest_stage(stages: list[StageModel], data: st.DataObject) -> None:
    num = len(stages[0].devices)
    heads = np.array(data.draw(st.lists(st.integers(0, 200), min_size=num, max_size=num)))
    kv_bytes = np.array(data.draw(st.lists(st.floats(0, 1e9), min_size=num, max_size=num)))
    one = merged(stages)
    total = sum(stage.num_layers for stage in stages)
    assert one.num_layers == total
    apart_s = [
        stage.num_layers * stage_times(stage_from_proto(stage).stage, heads, kv_bytes).makespan_s for stage in stages
    ]
    together_s = total * stage_times(stage_from_proto(one).stage, heads, kv_bytes).makespan_s
    np.testing.assert_allclose(together_s, max(apart_s), rtol=1e-9)
    for place, device in enumerate(one.devices):
        same = [stage.devices[place] for stage in stages]
        assert device.total_blocks == min(other.total_blocks for other in same)
        own = same[:1] if device.is_primary else same
        assert list(device.gpus) == [gpu for other in own for gpu in other.gpus]
        # Copies of a group's KV pass through all stages at once, each its share of the bytes.
        moved_s = max(stage.num_layers * other.link_byte_s for stage, other in zip(stages, same, strict=True))
        np.testing.assert_allclose(total * device.link_byte_s, moved_s)


def test_the_network_card_of_no_stage_is_underrated() -> None:
    device = StageDevice(name="a/0", gpus=["a/0"], is_primary=True, pieces=[AttentionPiece(call_s=1e-6)])
    cards = ((3, 1e-9, 2e-6), (1, 5e-9, 1e-6))
    stages = [
        StageModel(num_layers=n, heads=HEADS, devices=[device], nic_byte_s=byte_s, nic_s=s) for n, byte_s, s in cards
    ]
    one = merged(stages)
    for heads in (1, 10, 1000):
        taken_s = 4 * (one.nic_s + one.nic_byte_s * 320 * heads)
        assert taken_s >= max(n * (s + byte_s * 320 * heads) for n, byte_s, s in cards) * (1 - 1e-9)


CLUSTER = fleet("demo", "box: 2 L4 + 2 T4", network="{bandwidth: 10Gbps, latency: 20us}")


def test_a_plan_for_an_engine_has_one_head_map(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    words = ["place", "--cluster", str(tmp_path / "cluster.yaml"), "--model", "Llama-3.2-1B", "--workload", "64/256"]
    pins = ("type=T4:as=worker", "type=T4:use=2", "type=L4:use=2", "replicas=1")
    words += [word for pin in pins for word in ("--pin", pin)]
    assert run([*words, "--no-verify", "--quiet", "--out", str(tmp_path / "plan.json")]) == ExitCode.OK
    found = load_plan_and_problem(str(tmp_path / "plan.json"))
    assert [stage.num_layers for stage in found.plan.replicas[0].stages] == [12, 4]
    (one,) = stages_of_replica(found, 0)
    assert (one.stage, one.copy, one.num_layers) == (0, 0, found.problem.model.num_layers)
    assert [(device.name, list(device.gpus)) for device in one.devices] == [
        ("box/0", ["box/0"]),
        ("box/2", ["box/2", "box/3"]),
    ]
