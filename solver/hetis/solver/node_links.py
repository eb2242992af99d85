"""The explicit links between nodes as the search sees them: which nodes a replica may use together, and how it pays.

A search knows nodes by classes, so it charges a stage for all links that its class may use. Nodes with equal explicit
links form a *block*, and a replica is searched in several *sets* of blocks: in each it pays for the links between the
blocks of the set only. For every link that may be the slowest of a replica, the sets are the largest ones without a
slower link between any two blocks. So every replica lies in a set whose slowest link is that of its own nodes, and a
slow link costs nothing to replicas that do not use it.

Explicit links that are no slower than that between the zones of their nodes are left out, since every replica on both
nodes is charged that anyway. If the others differ so much that there would be too many blocks or sets, as where every
link was measured, the quickest of them count as the slowest of these: as few as it takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

from hetis.solver.cluster import Cluster, Link

MOST_BLOCKS = 12  # blocks of nodes with explicit links
MOST_SETS, MOST_TRIED = 16, 200  # sets of blocks, each of which is searched, and candidates for them
OTHERS = 0  # the block of nodes without slow explicit links
MESSAGE = 1e6  # bytes whose transfer tells which of two links is quicker, if one has more bandwidth and more latency

Pairs = Mapping[tuple[str, str], Link]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLinks:
    """Blocks of nodes, the explicit links between them, and the sets of blocks that a replica may use together.

    The nodes of a block have no link to each other that is slower than ``quick``, the slowest of those that count as
    equal; None: all links are distinguished.
    """

    block_of: Mapping[str, int]  # by node; those not listed are in ``OTHERS``
    between: Mapping[tuple[int, int], Link]  # in both orders, and inside a block
    sets: tuple[frozenset[int], ...]
    quick: Link | None = None

    def links_to(self, block: int) -> tuple[tuple[int, Link], ...]:
        """Return every block to which the nodes of a block have an explicit link, with the link."""
        return tuple((other, link) for (own, other), link in self.between.items() if own == block)


def node_links_of(cluster: Cluster, without: Collection[str] = ()) -> NodeLinks:
    """Return the explicit links of a cluster except some nodes."""
    return _of_slow_links(tuple(_slow_links(cluster, without).items()))


@lru_cache(maxsize=8)  # those of one fleet are needed several times: to search it, and to describe its family
def _of_slow_links(links: tuple[tuple[tuple[str, str], Link], ...]) -> NodeLinks:
    slow = dict(links)
    for quick in (None, *_slowest_of_the_quickest(slow.values())):
        if (found := _distinguished(slow, quick)) is not None:
            return found
    raise AssertionError("with all links alike there are two blocks")


def _slowest_of_the_quickest(links: Iterable[Link]) -> Iterator[Link]:
    """Yield the worst bandwidth and latency of the quickest link, of the two quickest, and so on to all of them."""
    ordered = sorted(set(links), key=lambda link: link.latency_s + MESSAGE / link.bytes_per_s)
    yield from itertools.accumulate(ordered, Link.slower_of)


def _distinguished(slow: Pairs, quick: Link | None) -> NodeLinks | None:
    """Return blocks and sets where links no slower than ``quick`` count as that; None if there are too many."""
    links = {pair: quick if quick is not None and _is_no_slower(link, quick) else link for pair, link in slow.items()}
    blocks = _blocks(links, quick)
    if len(blocks) > MOST_BLOCKS:
        return None
    block_of = {node: number for number, nodes in enumerate(blocks, start=OTHERS + 1) for node in nodes}
    between = dict[tuple[int, int], Link]()
    for (a, b), link in links.items():
        between[block_of[a], block_of[b]] = between[block_of[b], block_of[a]] = link
    sets = _sets(range(len(blocks) + 1), between, quick)
    return None if sets is None else NodeLinks(block_of=block_of, between=between, sets=sets, quick=quick)


def _slow_links(cluster: Cluster, without: Collection[str]) -> dict[tuple[str, str], Link]:
    """Return the explicit links between nodes of the cluster that are slower than the link between their zones."""
    network = cluster.network
    zone_of = {node: group.zone for node, group in cluster.nodes() if node not in without}
    return {
        (a, b): link
        for (a, b), link in network.between_nodes.items()
        if a != b and a in zone_of and b in zone_of
        if network.zone_link(zone_of[a], zone_of[b]).slower_of(link) != network.zone_link(zone_of[a], zone_of[b])
    }


def _blocks(links: Pairs, quick: Link | None) -> list[list[str]]:
    """Return nodes that have the same slower links to all others, and none to each other, in order of appearance."""
    of_node: dict[str, dict[str, Link]] = {node: {} for pair in links for node in pair}
    for (a, b), link in links.items():
        if link != quick:
            of_node[a][b] = of_node[b][a] = link
    alike: dict[frozenset[tuple[str, Link]], list[str]] = {}
    for node, slower in of_node.items():
        alike.setdefault(frozenset(slower.items()), []).append(node)
    return list(alike.values())


def _sets(
    blocks: Sequence[int], between: Mapping[tuple[int, int], Link], quick: Link | None
) -> tuple[frozenset[int], ...] | None:
    """Return the largest sets of blocks without a link slower than each threshold, or None if there are too many."""
    import networkx as nx

    found, slower = dict[frozenset[int], None](), {link for link in between.values() if link != quick}
    if len(slower) > MOST_SETS:
        return None  # each is the slowest of a set of its own
    for threshold in (quick, *(one if quick is None else one.slower_of(quick) for one in _thresholds(slower))):
        graph = nx.Graph()
        graph.add_nodes_from(blocks)
        graph.add_edges_from(
            pair for pair in itertools.combinations(blocks, 2) if _is_no_slower(between.get(pair), threshold)
        )
        found |= dict.fromkeys(map(frozenset, sorted(map(sorted, nx.find_cliques(graph)))))
        if len(found) > MOST_TRIED:
            return None
    sets = tuple(one for one in found if not any(_is_at_least(other, one, between) for other in found))
    return sets if len(sets) <= MOST_SETS else None


def _thresholds(links: Collection[Link]) -> Iterator[Link]:
    """Yield every worst bandwidth with every worst latency."""
    bandwidths = sorted({link.bytes_per_s for link in links}, reverse=True)
    for bytes_per_s, latency_s in itertools.product(bandwidths, sorted({link.latency_s for link in links})):
        yield Link(bytes_per_s=bytes_per_s, latency_s=latency_s)


def _is_no_slower(link: Link | None, threshold: Link | None) -> bool:
    return link is None or (threshold is not None and link.slower_of(threshold) == threshold)


def _is_at_least(other: frozenset[int], one: frozenset[int], between: Mapping[tuple[int, int], Link]) -> bool:
    """Return whether another set has all blocks of this one, and they pay for no slower links there."""
    return other > one and all(_slowest(block, one, between) == _slowest(block, other, between) for block in one)


def _slowest(block: int, blocks: frozenset[int], between: Mapping[tuple[int, int], Link]) -> Link | None:
    """Return the worst bandwidth and latency of the links from a block to any of several."""
    links = [between[block, other] for other in blocks if (block, other) in between]
    return reduce(Link.slower_of, links) if links else None
