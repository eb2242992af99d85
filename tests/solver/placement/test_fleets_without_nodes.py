from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.documents import from_data, to_data
from hetis.solver.advice import without_nodes
from hetis.solver.cluster import Cluster, GpuSlots, GpuType, Link, Network, NodeGroup

LINK = Link(bytes_per_s=1e10, latency_s=1e-5)
GPU = GpuType(name="L4", architecture="Ada", memory_bytes=24 * 2**30, mem_bytes_per_s=3e11, fp16_flops=1e14)


def fleet_of(counts: list[int]) -> Cluster:
    groups = tuple(
        NodeGroup(
            name=f"g{number}",
            gpus=(GpuSlots(gpu="L4", count=2),),
            count=max(count, 1),
            numbered=count > 0,
            zone=f"z{number % 2}",
        )
        for number, count in enumerate(counts)
    )
    names = [group.node_name(index) for group in groups for index in range(group.count)]
    between = dict.fromkeys(pairwise(names), LINK)
    return Cluster(
        name="fleet",
        node_groups=groups,
        gpu_types={"L4": GPU},
        network=Network(
            default=LINK, between_nodes=between, between_zones={("z0", "z1"): LINK} if len(groups) > 1 else {}
        ),
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_all_other_nodes_keep_their_names_gpus_zones_and_links(counts: list[int], data: st.DataObject) -> None:
    whole = fleet_of(counts)
    names = list(dict.fromkeys(device.node for device in whole.devices()))
    gone = data.draw(st.sets(st.sampled_from(names), max_size=len(names) - 1))
    rest = without_nodes(whole, gone)

    def seen(one: Cluster) -> list[tuple[str, str, str]]:
        return sorted((d.name, d.gpu, d.group.zone) for d in one.devices() if d.node not in gone)

    assert seen(rest) == seen(whole)
    assert not {device.node for device in rest.devices()} & gone
    kept = [name for name in names if name not in gone]
    for a in kept:
        for b in kept:
            assert rest.network.node_link(a, b) == whole.network.node_link(a, b)
    assert from_data(to_data(rest, self_contained=True)) == rest  # its document is valid


def test_a_fleet_that_lacks_nothing_stays_as_it_is() -> None:
    whole = fleet_of([3])
    assert without_nodes(whole, ()) is whole
