"""DispatchState and DispatchRequests files become solver values and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetis.formats.dispatch.dispatch_state import load_state, parse_state
from hetis.formats.dispatch.new_requests import NewRequests, load_requests, requests_from_words
from hetis.formats.dispatch.saved_state import AttentionPiece, SavedState, heads_of
from hetis.formats.documents import dump, load
from hetis.formats.errors import DocumentError
from hetis.formats.positions import Text
from hetis.solver.dispatch.dispatch_problem import HeadShape, Primary, Stage
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, PreparedMove, StateSnapshot
from hetis.solver.errors import InvalidProblemError

EXAMPLES = Path(__file__).parents[2] / "examples" / "dispatch"


def document(**changes: Any) -> dict[str, Any]:
    data = {
        "apiVersion": "hetis/v1",
        "kind": "DispatchState",
        "name": "s",
        "heads": {"groups": 8, "queries_per_group": 8, "head_dim": 128},
        "num_layers": 80,
        "devices": [
            {
                "name": "a100",
                "role": "primary",
                "tp": 2,
                "attention": [{"head": "2ns", "kv_read": "1TB/s", "call": "18us"}, {"call": "20us"}],
                "link": {"bandwidth": "80Gbps", "latency": "45us"},
                "kv_memory": "8GiB",
            },
            {
                "name": "l4",
                "attention": [{"head": "16ns", "kv_read": "250GB/s", "call": "11us"}],
                "link": {"bandwidth": "40Gbps", "latency": "45us"},
                "move_bandwidth": "25Gbps",
                "blocks": 1000,
            },
        ],
        "requests": [{"id": "r", "context_tokens": 100, "remaining_tokens": 5, "groups": {"a100": 6, "l4": 2}}],
    }
    return data | changes


def parsed(**changes: Any) -> SavedState:
    return parse_state(document(**changes), Text(file="state", text=None))


def test_a_file_means_what_the_solver_gets() -> None:
    state = parsed()
    stage = state.snapshot().stage
    # 2 x 128 x 2 bytes of keys and values; (2 + 2/8) x 128 x 2 bytes exchanged per query head.
    assert stage.heads == HeadShape(
        head_groups=8, queries_per_group=8, kv_bytes_per_token=512, exchange_bytes_per_head=576
    )
    assert stage.primary == Primary(device=0, tp=2, nic_byte_s=1e-10, nic_s=45e-6)
    assert stage.head_s.tolist() == [[2e-9, 0.0], [16e-9, 16e-9]]  # a device with fewer pieces repeats its last
    assert stage.kv_byte_s.tolist() == [[1e-12, 0.0], [4e-12, 4e-12]]
    assert stage.call_s.tolist() == [[18e-6, 20e-6], [11e-6, 11e-6]]
    assert stage.transfer_byte_s.tolist() == [0.0, 2e-10]
    assert state.move_byte_s().tolist() == [1e-10, 3.2e-10]
    # 8 GiB / (512 bytes x 16 tokens x 80 layers)
    assert [device.total_blocks for device in state.snapshot().devices] == [13107, 1000]
    assert state.snapshot().groups.tolist() == [[6, 2]]


def test_the_heads_of_a_catalogue_model_are_those_written_out() -> None:
    assert parsed(model="Llama-2-70B", heads=None).heads == parsed().heads
    assert parsed(model="Llama-2-70B", heads=None, kv_dtype="fp8").heads.kv_bytes_per_token == 256
    assert parsed(kv_dtype="fp8").heads.kv_bytes_per_token == 256


@pytest.mark.parametrize("model", ["Qwen3.5-27B", "DeepSeek-V3.2"])
def test_heads_that_share_more_than_kv_cannot_move(model: str) -> None:
    with pytest.raises(InvalidProblemError, match=r"cannot move: its layers have (states|a choice of tokens)"):
        heads_of(model, None, None, 16)


def test_cards_that_outnumber_head_groups_hold_every_block_several_times() -> None:
    devices = [document()["devices"][0] | {"tp": 8}]
    few = parsed(
        heads={"groups": 2, "queries_per_group": 8, "head_dim": 128},
        devices=devices,
        requests=[],
    )
    assert few.devices[0].total_blocks == 13107 // 4


def test_costs_that_a_gpu_type_stands_for_are_given_from_outside() -> None:
    devices = [
        document()["devices"][0],
        {"name": "l4", "gpu": "L4", "blocks": 1000, "link": {"bandwidth": "unlimited", "latency": 0}},
    ]
    state = parsed(devices=devices)
    with pytest.raises(InvalidProblemError, match="l4: the attention costs of L4 have to be looked up first"):
        state.snapshot()
    stage = state.snapshot({"l4": (AttentionPiece(call_s=1.0),)}).stage
    assert stage.call_s.tolist() == [[18e-6, 20e-6], [1.0, 1.0]]
    assert stage.transfer_byte_s.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_read(path: Path) -> None:
    assert isinstance(load(path), SavedState | NewRequests)


def test_a_move_under_way_is_read() -> None:
    state = load_state(EXAMPLES / "draining.yaml")
    assert state.snapshot({d.name: (AttentionPiece(),) for d in state.devices}).moves == (
        PreparedMove(number=0, request="essay-0", groups=1, source=4, target=2),
    )
    assert state.devices[4].status is DeviceStatus.DRAINING


def test_a_state_that_contradicts_itself_has_no_value() -> None:
    stage = parsed().snapshot().stage
    with pytest.raises(InvalidProblemError, match="2 KV blocks are in use of 1"):
        StateSnapshot(
            stage=Stage(
                heads=HeadShape(head_groups=1, queries_per_group=1, kv_bytes_per_token=1, exchange_bytes_per_head=1),
                devices=("a",),
                head_s=stage.head_s[:1],
                kv_byte_s=stage.kv_byte_s[:1],
                call_s=stage.call_s[:1],
                transfer_byte_s=np.zeros(1),
                transfer_s=np.zeros(1),
            ),
            devices=(DeviceSnapshot(name="a", total_blocks=1),),
            ids=("r",),
            context_tokens=np.array([32]),
            remaining_tokens=np.array([0]),
            groups=np.array([[1]]),
        )


def test_requests_are_read_back(tmp_path: Path) -> None:
    listed = requests_from_words(["10/3"])
    arrays = listed.to_solver()
    assert (arrays.ids, arrays.context_tokens.tolist(), arrays.growth_tokens.tolist()) == (("new-0",), [10], [3])
    (tmp_path / "requests.yaml").write_text(dump(listed))
    assert load_requests(tmp_path / "requests.yaml") == listed


def test_requests_in_words_get_names_that_are_free() -> None:
    found = requests_from_words(["8000/300", "20/0"], taken={"new-0"})
    assert [(r.id, r.context_tokens, r.output_tokens) for r in found.requests] == [
        ("new-1", 8000, 300),
        ("new-2", 20, 0),
    ]


def test_every_word_that_is_no_request_is_told() -> None:
    with pytest.raises(DocumentError) as caught:
        requests_from_words(["8000", "0/5", "9/9", "1e3/4"])
    assert [problem.message[:7] for problem in caught.value.problems] == ["'8000' ", "'0/5' i", "'1e3/4'"]
