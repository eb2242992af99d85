"""Cluster files of small fleets, in a line each."""

from __future__ import annotations

NETWORK = "{bandwidth: 100Gbps, latency: 20us}"


def fleet(name: str, *nodes: str, network: str = NETWORK) -> str:
    """Return the text of a cluster file. A node is ``a100: 2 A100-PCIe-80GB``, two of them ``2 t4: 1 T4``."""
    lines = []
    for node in nodes:
        (*count, node_name), gpus = node.split(": ")[0].split(), node.split(": ")[1].split(" + ")
        types = ", ".join("{{type: {1}, count: {0}}}".format(*part.split()) for part in gpus)
        lines.append(f"  - {{name: {node_name}, {''.join(f'count: {n}, ' for n in count)}gpus: [{types}]}}\n")
    return f"apiVersion: hetis/v1\nkind: Cluster\nname: {name}\nnodes:\n{''.join(lines)}network: {network}\n"
