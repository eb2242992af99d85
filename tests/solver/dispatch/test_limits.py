"""Values just within a limit are accepted, and those just beyond are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hetis.solver.dispatch.dispatch_problem import (
    MOST_BLOCKS,
    MOST_GROUPS,
    MOST_HEADS,
    MOST_KV_BYTES,
    MOST_TOKENS,
    DeviceLoad,
    DispatchPlan,
    DispatchProblem,
    HeadShape,
    Path,
    Primary,
    Requests,
    ShadowPrices,
    Stage,
)
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, PreparedMove, StateSnapshot, check_groups
from hetis.solver.errors import InvalidProblemError

HEADS = HeadShape(head_groups=4, queries_per_group=2, kv_bytes_per_token=512.0, exchange_bytes_per_head=640.0)
INF, NAN = float("inf"), float("nan")
NEVER = np.nextafter(0.0, -1.0)  # the largest number below 0


def heads(**changes: Any) -> HeadShape:
    return replace(HEADS, **changes)


def stage(**changes: Any) -> Stage:
    """Two equal devices."""
    ones = np.ones((2, 1))
    of_stage = Stage(
        heads=HEADS, devices=("d0", "d1"), head_s=ones, kv_byte_s=ones, call_s=ones, transfer_byte_s=np.ones(2),
        transfer_s=np.ones(2),
    )  # fmt: skip
    return replace(of_stage, **changes)


def load(**changes: Any) -> DeviceLoad:
    return replace(DeviceLoad.idle(np.array([1, 1])), **changes)


def requests(**changes: Any) -> Requests:
    given: dict[str, Any] = {"ids": ("a", "b"), "context_tokens": np.array([1, 2]), "growth_tokens": np.array([0, 0])}
    return Requests(**given | changes)


def primary(**changes: Any) -> Stage:
    return stage(primary=Primary(**{"device": 0} | changes))


def device(**changes: Any) -> DeviceSnapshot:
    return DeviceSnapshot(**{"name": "d0", "total_blocks": 20} | changes)


def snapshot(**changes: Any) -> StateSnapshot:
    """Request a has 3 and 1 groups of 17 tokens, two blocks; b has 4 groups of one block on the second device."""
    of_stage = StateSnapshot(
        stage=stage(),
        devices=(device(), device(name="d1")),
        ids=("a", "b"),
        context_tokens=np.array([17, 16]),
        remaining_tokens=np.array([0, 5]),
        groups=np.array([[3, 1], [0, 4]]),
    )
    return replace(of_stage, **changes)


def moving(**changes: Any) -> StateSnapshot:
    """One or two groups of a are moving to the second device."""
    move = PreparedMove(**{"number": 0, "request": "a", "groups": 1, "source": 0, "target": 1} | changes)
    return snapshot(moves=(move,))


Maker = Callable[..., Any]
WITHIN: list[tuple[Maker, dict[str, Any]]] = [
    *((heads, {name: value}) for name in ("head_groups", "queries_per_group", "block_tokens")
      for value in (1, MOST_GROUPS, np.int64(7))),
    *((heads, {name: 0.0}) for name in ("kv_bytes_per_token", "exchange_bytes_per_head")),
    *((stage, {name: np.zeros((2, 1))}) for name in ("head_s", "kv_byte_s", "call_s")),
    *((stage, {name: np.zeros(2)}) for name in ("transfer_byte_s", "transfer_s")),
    *((primary, {"tp": tp}) for tp in (1, 2, 4, 8, MOST_GROUPS)),
    *((primary, {name: 0.0}) for name in ("nic_byte_s", "nic_s")),
    (primary, {"device": 1}),
    (load, {"heads": [0, MOST_HEADS]}),
    (load, {"heads": np.array([0.0, float(MOST_HEADS)])}),
    (load, {"heads": np.array([0, 7], np.uint8)}),
    (load, {"free_blocks": [MOST_BLOCKS, -(2**62)]}),
    (load, {"free_blocks": np.array([float(MOST_BLOCKS), -(2.0**62)])}),
    (load, {"kv_bytes": [0.0, MOST_KV_BYTES]}),
    (requests, {"context_tokens": [1, MOST_TOKENS]}),
    (requests, {"context_tokens": np.array([1.0, float(MOST_TOKENS)])}),
    (requests, {"growth_tokens": [0, MOST_TOKENS]}),
    (device, {"total_blocks": 0}),
    (device, {"total_blocks": MOST_BLOCKS}),
    (device, {"high_water": 1.0}),
    (device, {"high_water": 1e-9}),
    (snapshot, {"context_tokens": np.array([1, 1]), "remaining_tokens": np.array([0, MOST_TOKENS])}),
    (snapshot, {"devices": (device(total_blocks=6), device(name="d1", total_blocks=6))}),  # 3 x 2, and 1 x 2 + 4 x 1
    (moving, {"groups": 3}),
    (moving, {"request": "b", "source": 1, "target": 0, "groups": 4}),
    (snapshot, {"ids": (), "context_tokens": np.zeros(0, np.int64), "remaining_tokens": np.zeros(0, np.int64),
                "groups": np.zeros((0, 2), np.int64)}),
]  # fmt: skip
BEYOND: list[tuple[Maker, dict[str, Any], str]] = [
    *((heads, {name: value}, f"{name} is {value}, must be a whole number >= 1 and <= 65536")
      for name in ("head_groups", "queries_per_group", "block_tokens") for value in (0, MOST_GROUPS + 1, 2.0)),
    *((heads, {name: value}, f"{name} is {value}, must be finite and >= 0")
      for name in ("kv_bytes_per_token", "exchange_bytes_per_head") for value in (NEVER, INF, NAN)),
    *((stage, {name: np.array([[0.0], [value]])}, f"d1: {name} is {value}, must be finite and >= 0")
      for name in ("head_s", "kv_byte_s", "call_s") for value in (NEVER, INF, NAN)),
    *((stage, {name: np.array([value, 0.0])}, f"d0: {name} is {value}, must be finite and >= 0")
      for name in ("transfer_byte_s", "transfer_s") for value in (NEVER, INF, NAN)),
    (stage, {"devices": ()}, "a stage needs at least one device"),
    (stage, {"devices": ("d0", "d0")}, "device d0 is listed 2 times"),
    (stage, {"head_s": np.ones(2)}, r"head_s has shape \(2,\), must be \[devices, pieces >= 1\]"),
    (stage, {"head_s": np.ones((2, 0))}, r"head_s has shape \(2, 0\), must be \[devices, pieces >= 1\]"),
    (stage, {"head_s": np.ones((1, 1))}, r"head_s has shape \(1, 1\), must be \(2, 1\)"),
    (stage, {"transfer_s": np.ones(3)}, r"transfer_s has shape \(3,\), must be \(2,\)"),
    *((primary, {"tp": tp}, f"tp of the primary is {tp}, must be a divisor") for tp in (0, 3, 6, 2 * MOST_GROUPS, 2.0)),
    *((primary, {"device": i}, f"primary device is {i}, must be one of 2 devices") for i in (-1, 2)),
    *((primary, {name: value}, f"primary {name} is {value}, must be finite and >= 0")
      for name in ("nic_byte_s", "nic_s") for value in (NEVER, INF, NAN)),
    (load, {"heads": [0, MOST_HEADS + 1]}, f"heads is {MOST_HEADS + 1}, must be"),
    (load, {"heads": [0, -1]}, "heads is -1, must be"),
    *((load, {"heads": [value, 0]}, f"^heads is {value}, must be ") for value in (0.7, NAN)),
    *((load, {"free_blocks": [n, 0]}, f"^free_blocks is {n}, must be ") for n in (NAN, INF, 0.5, 2**63 - 1)),
    (load, {"free_blocks": np.array([2**63, 0], np.uint64)}, f"^free_blocks is {2**63}, must be "),
    *((load, {"kv_bytes": [0, value]}, f"^kv_bytes is {value}, must be ") for value in (NAN, INF, -1.0)),
    *((load, {name: np.zeros((2, 1))}, rf"^{name} has shape \(2, 1\), must be ")
      for name in ("heads", "kv_bytes", "free_blocks")),
    (load, {"heads": np.array([0.0, -1.0])}, "heads is -1.0, must be"),
    (load, {"heads": np.array([True, False])}, "heads are of type bool, must be"),
    (load, {"free_blocks": [0, MOST_BLOCKS + 1]}, f"free_blocks is {MOST_BLOCKS + 1}, must be"),
    (load, {"free_blocks": np.array([0.0, -(2.0**63)])}, "free_blocks is -9.2"),
    (load, {"kv_bytes": [0.0, np.nextafter(MOST_KV_BYTES, INF)]}, "kv_bytes is 1.0000000000000001e.18, must be >= 0"),
    (load, {"kv_bytes": [NEVER, 0.0]}, "kv_bytes is -5e-324, must be >= 0"),
    (load, {"kv_bytes": np.zeros((2, 1))}, r"kv_bytes has shape \(2, 1\)"),
    (load, {"heads": [0]}, "heads, kv_bytes and free_blocks are of 1, 2 and 2 devices"),
    (load, {"kv_bytes": [0.0]}, "heads, kv_bytes and free_blocks are of 2, 1 and 2 devices"),
    (load, {"free_blocks": [0]}, "heads, kv_bytes and free_blocks are of 2, 2 and 1 devices"),
    (requests, {"context_tokens": [0, 1]}, "context_tokens is 0, must be"),
    (requests, {"context_tokens": np.array([0.0, 1.0])}, "context_tokens is 0.0, must be"),
    (requests, {"context_tokens": [1, MOST_TOKENS + 1]}, f"context_tokens is {MOST_TOKENS + 1}, must be"),
    (requests, {"growth_tokens": [0, MOST_TOKENS + 1]}, f"growth_tokens is {MOST_TOKENS + 1}, must be"),
    (requests, {"growth_tokens": [-1, 0]}, "growth_tokens is -1, must be a whole number >= 0 and <= 2147483648$"),
    *((requests, {"context_tokens": np.array([value, 1])},
       f"^context_tokens is {value}, must be a whole number >= 1 and <= 2147483648$")
      for value in (9 * 10**18, 100.9, NAN)),
    (requests, {"ids": ("a", "a")}, "request a is listed 2 times"),
    (requests, {"ids": ("a",)}, "1 requests have 2 contexts and 2 growths"),
    (requests, {"context_tokens": [1]}, "2 requests have 1 contexts and 2 growths"),
    (requests, {"growth_tokens": [1]}, "2 requests have 2 contexts and 1 growths"),
    (device, {"total_blocks": -1}, "d0: total_blocks is -1, must be"),
    (device, {"total_blocks": MOST_BLOCKS + 1}, f"d0: total_blocks is {MOST_BLOCKS + 1}, must be"),
    (device, {"high_water": 0.0}, "d0: high_water is 0.0, must be > 0 and <= 1"),
    (device, {"high_water": np.nextafter(1.0, 2.0)}, "d0: high_water is 1.0000000000000002, must be > 0 and <= 1"),
    (snapshot, {"devices": (device(), device(name="x"))}, "devices are d0, x, the stage has d0, d1"),
    (snapshot, {"ids": ("a", "a")}, "request a is listed 2 times"),
    (snapshot, {"context_tokens": np.array([1])}, "2 requests have 1 contexts and 2 remainders"),
    (snapshot, {"remaining_tokens": np.array([1])}, "2 requests have 2 contexts and 1 remainders"),
    (snapshot, {"context_tokens": np.array([0, 1])}, "requests need context_tokens >= 1 and remaining_tokens >= 0"),
    (snapshot, {"remaining_tokens": np.array([0, -1])}, "requests need context_tokens >= 1 and remaining_tokens >= 0"),
    (snapshot, {"context_tokens": np.array([1, MOST_TOKENS + 1])}, f"is {MOST_TOKENS + 1}, must be <= {MOST_TOKENS}"),
    (snapshot, {"remaining_tokens": np.array([1, MOST_TOKENS + 1])}, f"is {MOST_TOKENS + 1}, must be <= {MOST_TOKENS}"),
    (snapshot, {"groups": np.array([[4, 0]])}, r"groups has shape \(1, 2\), must be \(2, 2\)"),
    (snapshot, {"groups": np.array([[4, 0], [2, 1]])}, r"request b has \[2, 1\] head groups on the devices"),
    (snapshot, {"groups": np.array([[5, -1], [0, 4]])}, r"request a has \[5, -1\] head groups on the devices"),
    (snapshot, {"devices": (device(total_blocks=5), device(name="d1"))}, "d0: 6 KV blocks are in use of 5"),
    (snapshot, {"devices": (device(), device(name="d1", status=DeviceStatus.LOST))}, "d1 is lost, but 5 head groups"),
    (moving, {"request": "c"}, "move 0: no 1 groups of c can move so"),
    (moving, {"groups": 0}, "move 0: no 0 groups of a can move so"),
    (moving, {"target": 0}, "move 0: no 1 groups of a can move so"),
    (moving, {"target": 2}, "move 0: 2 is none of 2 devices"),
    (moving, {"source": -1}, "move 0: -1 is none of 2 devices"),
    (moving, {"groups": 4}, "request a: 4 groups are leaving d0, which holds 3"),
]  # fmt: skip


def test_what_is_just_within_the_limits_is_accepted() -> None:
    for maker, values in WITHIN:
        maker(**values)


def test_what_is_just_beyond_the_limits_is_refused() -> None:
    for maker, values, message in BEYOND:
        with pytest.raises(InvalidProblemError, match=message):
            maker(**values)


def test_two_moves_have_two_numbers() -> None:
    moves = tuple(PreparedMove(number=0, request="a", groups=1, source=0, target=1) for _ in range(2))
    with pytest.raises(InvalidProblemError, match=r"^two moves have the same number$"):
        snapshot(moves=moves)


def test_a_load_is_of_as_many_devices_as_the_stage() -> None:
    with pytest.raises(InvalidProblemError, match=r"^the load is of 1 devices, the stage has 2$"):
        DispatchProblem(stage=stage(), load=DeviceLoad.idle(np.array([1])), requests=requests())


def test_whole_numbers_of_any_type_become_64_bits() -> None:
    for kind in (np.int8, np.uint64, np.float32, list):
        values = [1, 2] if kind is list else np.array([1, 2], kind)
        made = requests(context_tokens=values)
        assert made.context_tokens.dtype == np.int64
        assert made.context_tokens.tolist() == [1, 2]
    empty = requests(ids=(), context_tokens=[], growth_tokens=[])
    assert empty.context_tokens.dtype == np.int64
    assert empty.blocks(16).tolist() == []


def test_blocks_are_counted_whole() -> None:
    made = requests(ids=("a", "b", "c"), context_tokens=np.array([15, 16, 17]), growth_tokens=np.array([1, 1, 0]))
    assert made.blocks(16).tolist() == [1, 2, 2]
    assert made.blocks(1).tolist() == [16, 17, 17]


@pytest.mark.parametrize(("tp", "unit"), [(None, 1), (2, 2), (4, 4), (8, 4)])
def test_the_primary_takes_as_many_groups_as_it_has_cards_at_most_all(tp: int | None, unit: int) -> None:
    made = stage() if tp is None else primary(tp=tp, device=1)
    assert made.primary_groups == unit
    assert [made.has_primary_at(i) for i in range(2)] == [False, tp is not None]
    if unit > 1:
        check_groups(made, "a", np.array([4 - unit, unit]))
        with pytest.raises(InvalidProblemError, match=r"^request a: 1 head groups on d1, which takes \d at a time$"):
            check_groups(made, "a", np.array([3, 1]))
        with pytest.raises(InvalidProblemError, match="which takes"):
            snapshot(stage=made, groups=np.array([[3, 1], [4 - unit, unit]]))


def test_a_snapshot_counts_blocks_and_load() -> None:
    """a: 2 blocks per group, as many with growth; b: 1, and 2 with its 5 tokens; a group of a also on the second."""
    seen = moving()
    assert seen.context_blocks().tolist() == [2, 1]
    assert seen.expected_blocks().tolist() == [2, 2]
    assert seen.used_blocks().tolist() == [6, 2 + 4 + 2]
    assert seen.incoming().tolist() == [[0, 1], [0, 0]]
    assert seen.total_blocks().tolist() == [20, 20]
    of_seen = seen.load()
    assert of_seen.heads.tolist() == [6, 10]
    assert of_seen.kv_bytes.tolist() == [3 * 17 * 512.0, (17 + 4 * 16) * 512.0]
    assert of_seen.free_blocks.tolist() == [20 - 6, 20 - 2 - 8 - 2]
    draining = replace(seen, devices=(device(status=DeviceStatus.DRAINING), device(name="d1")))
    assert draining.load().free_blocks.tolist() == [0, 8]
    assert draining.takes_groups().tolist() == [False, True]


def plan(makespan_s: float, bound_s: float) -> DispatchPlan:
    prices = ShadowPrices(piece=np.zeros((1, 1)), block_s=np.zeros(1), nic=0.0, request_s=np.zeros(0))
    return DispatchPlan(
        groups=np.zeros((0, 1), np.int64), makespan_s=makespan_s, bound_s=bound_s, relaxed_s=bound_s, path=Path.CHAIN,
        unplaced=(), prices=prices,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("makespan_s", "bound_s", "gap"), [(0.0, 0.0, 0.0), (1.0, 2.0, 0.0), (0.75, 0.5, 0.5), (1.0, 0.0, INF)]
)
def test_the_gap_is_what_the_makespan_is_above_the_bound(makespan_s: float, bound_s: float, gap: float) -> None:
    assert plan(makespan_s, bound_s).gap == gap


def test_the_limits_keep_sums_of_whole_numbers_within_64_bits() -> None:
    assert (MOST_TOKENS, MOST_GROUPS) == (2**31, 2**16)
    assert (MOST_BLOCKS, MOST_HEADS, MOST_KV_BYTES) == (2**40, 2**40, 1e18)
    # Context and growth in blocks of one token, for all groups of sixteen thousand requests.
    assert 2 * MOST_TOKENS * MOST_GROUPS * 2**14 < 2**63
